"""The server's store in memory: what a coordinator has written, by kind and key. A crash of the server does not touch it.

The counterpart of `server.adapters.store.SqlStore`; `tests/server/test_store_contract.py` holds both to the same answers.
"""

from collections.abc import Callable, Sequence
from typing import Any

from protocol.release import Release
from server.events import Started
from server.fleet.registry import DeviceRecord
from server.ports import (
    CacheEntry,
    CacheRemoval,
    DeltaRefusal,
    IdleDelta,
    IdleDeltaRemoval,
    Record,
    Records,
    Repository,
)
from server.releases.catalog import Catalog
from server.rollouts.records import Decision, MemberRecord, Order, RolloutRecord


class MemoryStore(Records):
    """What was saved, by kind and key.

    Args:
        repository: What is signed to begin with.

    Attributes:
        repository: What was signed last.
        releases: What was published, oldest first.
        records_saved: How many records were written.
        transactions: In how many transactions.
    """

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self.releases: list[Release] = []
        self.records_saved = 0
        self.transactions = 0
        self._tables: dict[type, dict[Any, Record]] = {
            kind: {}
            for kind in (
                DeviceRecord,
                RolloutRecord,
                MemberRecord,
                Decision,
                Order,
                DeltaRefusal,
                IdleDelta,
                CacheEntry,
            )
        }

    def save(self, records: Sequence[Record]) -> None:
        """As `Records.save`."""
        self.transactions += 1
        self.records_saved += len(records)
        for record in records:
            match record:
                case CacheRemoval():
                    self._tables[CacheEntry].pop(record.name, None)
                case IdleDeltaRemoval():
                    self._tables[IdleDelta].pop(record.path, None)
                case RolloutRecord() if record.id not in self._tables[RolloutRecord]:
                    pass
                case _:
                    self._tables[type(record)][_key(record)] = record

    def started(self, catalog: Catalog) -> Started:
        """What the coordinator begins with."""
        return Started(
            catalog=catalog,
            devices=self.devices(),
            rollouts=self.rollouts(),
            members=self.members(),
            refusals=self.refusals(),
            idle=self.idle_deltas(),
            cached=self.cached(),
            orders=[order for order in self.orders() if not order.answer],
        )

    def devices(self) -> list[DeviceRecord]:
        """As `Records.devices`."""
        return self._sorted(DeviceRecord)

    def rollouts(self) -> list[RolloutRecord]:
        """As `Records.rollouts`."""
        return self._all(RolloutRecord)

    def rollout(self, rollout: str) -> RolloutRecord:
        """One rollout, which there must be."""
        record = self._tables[RolloutRecord][rollout]
        assert isinstance(record, RolloutRecord)
        return record

    def members(self, rollout: str | None = None) -> list[MemberRecord]:
        """As `Records.members`."""
        return [member for member in self._sorted(MemberRecord) if rollout in (None, member.rollout)]

    def refusals(self) -> list[DeltaRefusal]:
        """As `Records.refusals`."""
        return self._all(DeltaRefusal)

    def idle_deltas(self) -> list[IdleDelta]:
        """As `Records.idle_deltas`."""
        return self._sorted(IdleDelta)

    def cached(self) -> list[CacheEntry]:
        """As `Records.cached`."""
        return self._all(CacheEntry)

    def create_rollout(self, make: Callable[[int, list[RolloutRecord]], RolloutRecord]) -> RolloutRecord:
        """As `Records.create_rollout`."""
        before = self.rollouts()
        record = make(len(before) + 1, before)
        self._tables[RolloutRecord][record.id] = record
        self.save([record])
        return record

    def order_rollout(
        self, rollout: str, make: Callable[[RolloutRecord | None, list[Order]], Order]
    ) -> Order:
        """As `Records.order_rollout`."""
        found = [record for record in self.rollouts() if record.id == rollout]
        order = make(found[0] if found else None, self.orders(rollout))
        self.save([order])
        return order

    def orders(self, rollout: str | None = None) -> list[Order]:
        """As `Records.orders`."""
        return [order for order in self._sorted(Order) if rollout in (None, order.rollout)]

    def decisions(self, rollout: str) -> list[Decision]:
        """As `Records.decisions`."""
        return [decision for decision in self._sorted(Decision) if decision.rollout == rollout]

    def _all(self, kind: type) -> list[Any]:
        """In the order in which they came first."""
        return list(self._tables[kind].values())

    def _sorted(self, kind: type) -> list[Any]:
        """In the order of their keys."""
        table = self._tables[kind]
        return [table[key] for key in sorted(table)]


def _key(record: Record) -> Any:
    match record:
        case DeviceRecord():
            return record.device
        case RolloutRecord():
            return record.id
        case MemberRecord():
            return record.rollout, record.device
        case Decision() | Order():
            return record.rollout, record.number
        case DeltaRefusal() | IdleDelta():
            return record.path
        case CacheEntry():
            return record.name
    raise AssertionError(f"{type(record).__name__} has no key")
