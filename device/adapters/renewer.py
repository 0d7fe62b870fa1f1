"""Keeps the device's certificate fresh: asks over the present connection, and exchanges the files. `renewal.py` says when."""

import logging
import random
from typing import Final

from device.adapters.identity import Clock, Identity
from device.adapters.mqtt import MqttLoop
from device.ports import Transport
from device.renewal import Renewal
from protocol.errors import WhimbrelError
from protocol.ids import DeviceId
from protocol.topics import Topics

LOOK_S: Final = 3600.0
"""How often the life of the certificate is looked at."""

_LOG: Final = logging.getLogger(__name__)


class Renewer:
    """Renews the certificate of one device; everything happens in the loop's thread.

    The connection stays as it is: the new certificate is shown when the next one is opened.

    Args:
        identity: Key and certificate.
        device: Whose.
        topics: Of its fleet.
        loop: For looking at the clock once in a while.
        transport: The device's connection.
        clock: Source of instants.
        rng: Source of jitter.
    """

    def __init__(
        self,
        identity: Identity,
        device: DeviceId,
        topics: Topics,
        loop: MqttLoop,
        transport: Transport,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._identity = identity
        self._request_topic = topics.renewal(device)
        self._answer_topic = topics.certificate(device)
        self._loop = loop
        self._transport = transport
        self._clock = clock
        self._renewal = Renewal(rng)
        self._is_connected = False
        self._is_stopped = False

    def start(self) -> None:
        """Look every hour from now on."""
        self._look()

    def stop(self) -> None:
        """Look no more."""
        self._is_stopped = True

    def connected(self) -> None:
        """The broker let us in."""
        self._is_connected = True
        self._transport.subscribe((self._answer_topic,), 1)
        self._ask_if_due()

    def disconnected(self) -> None:
        """The connection is gone."""
        self._is_connected = False

    def heard(self, topic: str, payload: bytes) -> bool:
        """Take a message if it is for us; whether it was."""
        if topic != self._answer_topic:
            return False
        try:
            line = self._identity.take(payload)
        except WhimbrelError as error:
            _LOG.error("the answer about the next certificate is of no use: %s", error)
        else:
            if line:
                _LOG.info("%s", line)
        return True

    def _look(self) -> None:
        if not self._is_stopped:
            self._ask_if_due()
            self._loop.call_later(LOOK_S, self._look)

    def _ask_if_due(self) -> None:
        if not self._is_connected:
            return
        try:
            if self._renewal.is_due(self._identity.credentials().life, self._clock.now_ms()):
                request = self._identity.request(self._request_topic)
                self._transport.publish(self._request_topic, request, 1, retain=False)
                _LOG.info("asking for the next certificate")
        except WhimbrelError as error:
            _LOG.error("the certificate cannot be renewed: %s", error)
