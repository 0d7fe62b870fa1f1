import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import TopicError
from protocol.ids import DeviceId, FleetId, digest_of, parse_device_id, parse_family, parse_version
from protocol.topics import (
    REQUEST_SHARDS,
    ChunkAnswerTopic,
    ChunkTopic,
    DesiredTopic,
    KeysTopic,
    LinkTopic,
    MetadataAnswerTopic,
    MetadataTopic,
    ReportTopic,
    RequestTopic,
    Topics,
    request_shard,
)

TOPICS = Topics(FleetId("lab"))
DEVICE = DeviceId("pi-7")
BLOB = digest_of(b"blob")


@pytest.mark.parametrize(
    ("topic", "parsed"),
    [
        (TOPICS.desired(DEVICE), DesiredTopic(DEVICE)),
        (TOPICS.report(DEVICE), ReportTopic(DEVICE)),
        (TOPICS.link(DEVICE), LinkTopic(DEVICE)),
        (TOPICS.chunk_answer(DEVICE), ChunkAnswerTopic(DEVICE)),
        (TOPICS.metadata_answer(DEVICE), MetadataAnswerTopic(DEVICE)),
        (TOPICS.keys(DEVICE), KeysTopic(DEVICE)),
        (TOPICS.request(DEVICE), RequestTopic(DEVICE)),
        (TOPICS.chunk(BLOB, 17), ChunkTopic(BLOB, 17)),
        (TOPICS.metadata("timestamp"), MetadataTopic("timestamp")),
        (TOPICS.root(12), MetadataTopic("root.12")),
    ],
)
def test_every_topic_is_parsed_to_what_it_was_built_from(topic: str, parsed: object) -> None:
    assert TOPICS.parse(topic) == parsed
    assert topic.count("/") <= 7


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "wb1.other/md/timestamp",
        "wb1.lab",
        "wb1.lab/md/root.",
        "wb1.lab/md/root.x",
        "wb1.lab/md/root.²",
        "wb1.lab/md/mirrors",
        "wb1.lab/dev/PI/report",
        "wb1.lab/dev/pi-7/other",
        f"wb1.lab/b/{BLOB}.1/17",
        f"wb1.lab/b/{BLOB}.2/-17",
        f"wb1.lab/b/{BLOB}.2/{10**30}",
        f"wb1.lab/b/{BLOB[:-1]}.2/17",
        f"wb1.lab/req/{(request_shard(DEVICE) + 1) % REQUEST_SHARDS}/pi-7",
        "wb1.lab/dev/#/report",
    ],
)
def test_any_other_topic_is_refused(topic: str) -> None:
    with pytest.raises(TopicError):
        TOPICS.parse(topic)


@given(st.text())
def test_parsing_a_topic_never_does_anything_but_refuse(topic: str) -> None:
    for text in (topic, f"wb1.lab/{topic}", f"wb1.lab/dev/{topic}", f"wb1.lab/b/{topic}"):
        try:
            TOPICS.parse(text)
        except TopicError:
            continue


@given(st.text(max_size=80))
def test_a_name_never_contains_what_widens_a_topic_or_leaves_a_folder(text: str) -> None:
    for parse in (parse_device_id, parse_family, parse_version):
        try:
            parse(text)
        except TopicError:
            continue
        assert text == text.lower()
        assert not set(text) & set("/+#$\0\n ")
        assert text not in {".", ".."}


def test_requests_are_spread_over_all_shards() -> None:
    shards = {request_shard(DeviceId(f"device-{number}")) for number in range(400)}
    assert shards == set(range(REQUEST_SHARDS))
    assert sum("/req/" in pattern for pattern in TOPICS.server_filters()) == REQUEST_SHARDS
