"""The golden messages and the JSON schema, which readers in other languages are tested with."""

import json
from pathlib import Path

import jsonschema
import msgspec
import pytest
from publishers import seen

from maskcast.pipeline.subscriber.losses import LossTracker
from maskcast.pipeline.wire.message import (
    EventHeader,
    EventMessage,
    InstancesHeader,
    InstancesMessage,
    WireError,
    decode,
    decode_header,
    encode,
)

ROOT = Path(__file__).parents[3]
GOLDEN = sorted((ROOT / "tests" / "golden").glob("*.json"))
INSTANCES = [path for path in GOLDEN if path.stem.startswith("instances")]
MALFORMED = sorted((ROOT / "tests" / "golden" / "malformed").glob("*.json"))
SEQUENCES = sorted((ROOT / "tests" / "golden" / "sequences").glob("*.json"))
SCHEMA = json.loads((ROOT / "docs" / "wire.schema.json").read_text())


def parts_of(found):
    return [bytes.fromhex(part) for part in found["parts"]]


def schema_of(kind):
    return jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": SCHEMA["$defs"]})


@pytest.mark.parametrize("path", INSTANCES, ids=lambda path: path.stem)
def test_golden_masks_have_the_areas_that_their_files_state(path):
    found = json.loads(path.read_text())
    instances = decode(parts_of(found)).instances
    if instances.masks is None:
        assert found["areas"] is None
    else:
        areas = [int(instances.mask(i).sum()) for i in range(len(instances))]
        assert areas == found["areas"]


@pytest.mark.parametrize("path", MALFORMED, ids=lambda path: path.stem)
def test_malformed_golden_messages_are_refused(path):
    with pytest.raises(WireError):
        decode(parts_of(json.loads(path.read_text())))


def test_there_are_malformed_messages_of_every_part_and_format():
    names = " ".join(path.stem for path in MALFORMED)
    for word in (
        "topic",
        "header",
        "arrays",
        "box",
        "score",
        "label",
        "crop",
        "rle",
        "polygon",
        "keypoints",
    ):
        assert word in names


@pytest.mark.parametrize("path", SEQUENCES, ids=lambda path: path.stem)
def test_a_golden_sequence_counts_as_its_file_states(path):
    found, tracker = json.loads(path.read_text()), LossTracker()
    total = {"lost": 0, "repeated": 0, "restarts": 0}
    for message in found["messages"]:
        source, header = decode_header(parts_of(message))
        add = tracker.add_event if isinstance(header, EventHeader) else tracker.add_instances
        gap = add(source, header)
        counted = (0, True, False) if gap is None else (gap.lost, False, gap.restarted)
        expected = (message["lost"], message["repeated"], message["restarted"])
        assert counted == expected, message["about"]
        for key, count in zip(total, counted, strict=True):
            total[key] += count
    assert total == found["total"]
    assert tracker.tally.lost == total["lost"]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_headers_fit_the_schema(path):
    header = json.loads(path.read_text())["header"]
    schema_of("event" if "event" in header else "instances").validate(header)


def test_the_schema_has_the_keys_of_the_headers_with_their_defaults():
    for kind, struct in (("instances", InstancesHeader), ("event", EventHeader)):
        definition = SCHEMA["$defs"][kind]
        known = {field.encode_name: field for field in msgspec.structs.fields(struct)}
        assert set(definition["properties"]) == set(known)
        required = {name for name, field in known.items() if field.required}
        assert set(definition["required"]) == required
        example = {"publisher": "0" * 16, "event": "x", "masks": "none", "width": 1, "height": 1}
        fields = {name: example.get(name, 0) for name in required}
        whole = json.loads(msgspec.json.encode(msgspec.structs.asdict(struct(**fields))))
        for name in set(known) - required:
            assert definition["properties"][name]["default"] == whole[name]


@pytest.mark.parametrize(
    "name", ["seq_absent", "seq_negative", "publisher", "width_zero", "width_large", "masks"]
)
def test_the_schema_refuses_malformed_headers(name):
    path = ROOT / "tests" / "golden" / "malformed" / f"header_{name}.json"
    header = msgspec.msgpack.decode(parts_of(json.loads(path.read_text()))[1])
    assert not schema_of("instances").is_valid(header)


def test_encoded_headers_fit_the_schema():
    instances = seen()
    header = InstancesHeader(
        publisher="0" * 16,
        seq=0,
        index=0,
        capture_ns=0,
        publish_ns=0,
        width=instances.width,
        height=instances.height,
        count=len(instances),
        masks="crop_u8",
        pts_s=1.5,
        stage_ms={"infer": 3.0},
        drops={"decode": {"replaced": 3}},
        dropped_before=3,
        zones={"door": 2},
        lines={"gate": {"forward": 1, "backward": 0}},
    )
    packed = encode(InstancesMessage("cam1", header, instances))[1]
    schema_of("instances").validate(msgspec.msgpack.decode(packed))
    event = EventHeader(publisher="0" * 16, seq=0, publish_ns=0, event="x", data={"a": [1, None]})
    packed = encode(EventMessage("cam1", event))[1]
    schema_of("event").validate(msgspec.msgpack.decode(packed))
