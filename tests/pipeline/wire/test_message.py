import contextlib
import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskcast.engines.errors import InputError
from maskcast.engines.instances.instances import Instances, PolygonMasks
from maskcast.engines.instances.keypoints import COCO_PERSON, Keypoints
from maskcast.pipeline.wire.message import (
    EventHeader,
    EventMessage,
    InstancesHeader,
    InstancesMessage,
    WireError,
    check_source_name,
    decode,
    decode_header,
    encode,
    labels_id,
    topic,
)

GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("*.json"))
SPECIFICATION = Path(__file__).parents[3] / "docs" / "wire.md"
FORMATS = ("crop_u8", "crop_bits", "coco_rle", "polygon", "none")


def parts_of(path):
    return [bytes.fromhex(part) for part in json.loads(path.read_text())["parts"]]


def seen(count, width=640, height=480, seed=0):
    """Return instances with round masks in random boxes."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((count, 2, 2)), axis=1) * [width, height]
    y, x = np.mgrid[0:28, 0:28] - 13.5
    disc = np.rint(255 / (1 + np.exp(np.hypot(x, y) - 11))).astype(np.uint8)
    return Instances(
        width,
        height,
        corners.reshape(count, 4).astype(np.float32),
        np.sort(rng.random(count).astype(np.float32))[::-1].copy(),
        rng.integers(1, 91, count).astype(np.int32),
        np.repeat(disc[None], count, axis=0),
    )


def message(instances, masks, **header):
    fields = {
        "publisher": "00112233445566ff",
        "seq": 3,
        "index": 5,
        "capture_ns": 1_767_225_600_000_000_000,
        "publish_ns": 1_767_225_600_042_000_000,
        "width": instances.width,
        "height": instances.height,
        "count": len(instances),
        "labels": "0123abcd",
        "pts_s": 1.5,
        "stage_ms": {"decode": 1.0, "preprocess": 2.0, "infer": 30.0, "masks": 4.0},
        "drops": {"decode": {"replaced": 12}},
    }
    return InstancesMessage("cam1", InstancesHeader(masks=masks, **fields | header), instances)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_messages_decode_and_encode_to_the_same_bytes(path):
    parts = parts_of(path)
    assert encode(decode(parts)) == parts


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_messages_hold_what_their_files_state(path):
    expected, found = json.loads(path.read_text()), decode(parts_of(path))
    assert found.source == "cam1"
    assert json.loads(msgspec.json.encode(found.header)) == expected["header"]
    if "boxes" in expected:
        assert found.instances.boxes.tolist() == expected["boxes"]
        assert found.instances.scores.tolist() == expected["scores"]
        assert found.instances.labels.tolist() == expected["labels"]
        ids = found.instances.track_ids
        assert (None if ids is None else ids.tolist()) == expected.get("track_ids")
        points = found.instances.keypoints
        assert (None if points is None else points.tolist()) == expected.get("keypoints")


def test_there_is_a_golden_message_of_every_format():
    headers = [json.loads(path.read_text())["header"] for path in GOLDEN]
    assert {header.get("masks") for header in headers} >= set(FORMATS)
    assert {header.get("event") for header in headers} >= {"labels", "state", "ended"}


def test_golden_masks_are_the_same_object_in_every_format():
    found = {}
    for form in FORMATS[:-1]:
        path = next(path for path in GOLDEN if path.stem == f"instances_{form}")
        found[form] = decode(parts_of(path)).instances
    for i in range(2):
        expected = found["crop_u8"].mask(i)
        assert expected.sum() > 100
        for instances in found.values():
            mask = instances.mask(i)
            assert (mask & expected).sum() > 0.9 * (mask | expected).sum()


def test_the_specifications_example_is_the_golden_file():
    text = SPECIFICATION.read_text()
    example = text[text.index("## A worked example") :]
    dumps = re.findall(r"```hex\n(.*?)```", example, re.DOTALL)
    parts = [bytes.fromhex("".join(line.split("|")[0] for line in d.splitlines())) for d in dumps]
    assert parts == parts_of(GOLDEN[0].parent / "instances_worked.json")


OLD_HEADER_KEYS = [
    "publisher",
    "seq",
    "index",
    "capture_ns",
    "publish_ns",
    "width",
    "height",
    "count",
    "masks",
    "labels",
    "pts_s",
    "clock",
    "stage_ms",
    "drops",
]


@pytest.mark.parametrize("form", FORMATS)
def test_a_reader_without_track_ids_reads_the_same_from_a_message_that_has_them(form):
    plain = seen(5)
    tracked = replace(plain, track_ids=np.array([9, 4, 0, 12, 0], np.int32))
    new = encode(
        message(
            tracked,
            form,
            arrays=("track_ids",),
            zones={"door": 2},
            lines={"gate": {"forward": 3, "backward": 1}},
        )
    )
    old = encode(message(plain, form))
    fields = msgspec.msgpack.decode(new[1])
    assert {key: fields[key] for key in OLD_HEADER_KEYS if key in fields} == msgspec.msgpack.decode(
        old[1]
    )
    assert new[2][: 24 * 5] == old[2]
    assert new[3] == old[3]
    assert len(new) == len(old)


def test_a_message_without_tracks_has_none_of_their_header_keys():
    fields = msgspec.msgpack.decode(encode(message(seen(2), "none"))[1])
    assert not {"arrays", "zones", "lines"} & set(fields)


def test_track_ids_and_counts_are_decoded():
    tracked = replace(seen(3), track_ids=np.array([7, 0, 2**31 - 1], np.int32))
    lines = {"gate": {"forward": 3, "backward": 1}}
    found = decode(
        encode(message(tracked, "none", arrays=("track_ids",), zones={"door": 2}, lines=lines))
    )
    assert found.instances.track_ids.tolist() == [7, 0, 2**31 - 1]
    assert found.header.zones == {"door": 2}
    assert found.header.lines == lines


@pytest.mark.parametrize("ids", [[1, 1, 2], [-1, 2, 3]])
def test_invalid_track_ids_are_refused(ids):
    tracked = replace(seen(3), track_ids=np.array([1, 2, 3], np.int32))
    parts = encode(message(tracked, "none", arrays=("track_ids",)))
    parts[2] = parts[2][: 24 * 3] + np.array(ids, "<i4").tobytes()
    with pytest.raises(WireError, match="track id"):
        decode(parts)


def test_a_message_that_is_too_short_for_its_track_ids_is_refused():
    tracked = replace(seen(3), track_ids=np.array([1, 2, 3], np.int32))
    parts = encode(message(tracked, "none", arrays=("track_ids",)))
    with pytest.raises(WireError, match="ids"):
        decode([*parts[:2], parts[2][:-1], parts[3]])


def posed(instances, seed=0, names=COCO_PERSON):
    """Return the same instances with keypoints all over the frame."""
    limit = [instances.width, instances.height, 1]
    points = np.random.default_rng(seed).random((len(instances), len(names), 3)) * limit
    return replace(instances, keypoints=points.astype(np.float32))


@pytest.mark.parametrize("form", FORMATS)
def test_a_reader_without_keypoints_reads_the_same_from_a_message_that_has_them(form):
    plain = replace(seen(5), track_ids=np.array([9, 4, 0, 12, 0], np.int32))
    new = encode(
        message(posed(plain), form, arrays=("track_ids", "keypoints"), keypoints=COCO_PERSON)
    )
    old = encode(message(plain, form, arrays=("track_ids",)))
    fields, before = msgspec.msgpack.decode(new[1]), msgspec.msgpack.decode(old[1])
    assert fields["arrays"][:1] == before["arrays"]
    for key in OLD_HEADER_KEYS:
        assert fields.get(key) == before.get(key)
    assert new[2:4] == old[2:4]
    assert new[4] == b""
    assert len(new) == 6


def test_a_message_without_keypoints_has_neither_their_header_keys_nor_their_part():
    parts = encode(message(seen(2), "crop_u8"))
    assert len(parts) == 4
    assert not {"arrays", "keypoints"} & set(msgspec.msgpack.decode(parts[1]))


@pytest.mark.parametrize("jpeg", [None, b"an image"])
@pytest.mark.parametrize("ids", [None, [7, 0, 2]])
def test_keypoints_are_decoded_with_and_without_an_image_and_tracks(jpeg, ids):
    instances = posed(seen(3))
    arrays = ("keypoints",)
    if ids is not None:
        instances = replace(instances, track_ids=np.array(ids, np.int32))
        arrays = ("track_ids", "keypoints")
    sent = replace(message(instances, "crop_u8", arrays=arrays, keypoints=COCO_PERSON), jpeg=jpeg)
    found = decode(encode(sent))
    assert (found.instances.keypoints == instances.keypoints).all()
    assert found.header.keypoints == COCO_PERSON
    assert found.jpeg == jpeg
    assert (found.instances.track_ids is None) == (ids is None)
    assert encode(found) == encode(sent)


def test_a_frame_without_instances_keeps_the_number_of_its_keypoints():
    sent = message(posed(seen(0)), "none", arrays=("keypoints",), keypoints=COCO_PERSON)
    assert decode(encode(sent)).instances.keypoints.shape == (0, 17, 3)


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(1, 16384), st.integers(1, 16384)),
    count=st.integers(0, 9),
    names=st.lists(st.text(min_size=1, max_size=64), min_size=1, max_size=40, unique=True),
    data=st.data(),
)
def test_keypoints_of_any_model_and_frame_are_decoded_exactly(size, count, names, data):
    place = st.integers(0, len(names) - 1)
    table = Keypoints(tuple(names), tuple(data.draw(st.lists(st.tuples(place, place), max_size=9))))
    limits = np.array([*size, 1], np.float32)
    shares = data.draw(
        st.lists(st.sampled_from([0, 0.25, 0.7, 1]), min_size=3, max_size=3 * len(names))
    )
    points = np.resize(np.array(shares, np.float32), (count, len(names), 3)) * limits
    instances = replace(seen(count, *size), keypoints=points.astype(np.float32))
    found = decode(encode(message(instances, "none", arrays=("keypoints",), keypoints=table)))
    assert found.header.keypoints == table
    assert found.instances.keypoints.tobytes() == instances.keypoints.tobytes()
    assert found.instances.keypoints.shape == instances.keypoints.shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 640.5])
def test_invalid_keypoints_are_neither_sent_nor_read(value):
    good = posed(seen(3))
    header = {"arrays": ("keypoints",), "keypoints": COCO_PERSON}
    parts = encode(message(good, "none", **header))
    points = good.keypoints.copy()
    points[1, 5, 0] = value
    with pytest.raises(WireError, match="keypoint"):
        encode(message(replace(good, keypoints=points), "none", **header))
    with pytest.raises(WireError, match="keypoint"):
        decode([*parts[:5], points.tobytes()])


def test_a_header_must_name_the_keypoints_that_the_instances_have():
    instances = posed(seen(2))
    for header in (
        {"arrays": ("keypoints",)},
        {"keypoints": COCO_PERSON},
        {"arrays": ("keypoints",), "keypoints": Keypoints(("head", "foot"))},
    ):
        with pytest.raises(WireError, match="keypoints"):
            encode(message(instances, "none", **header))
    with pytest.raises(WireError, match="keypoints"):
        encode(message(seen(2), "none", keypoints=COCO_PERSON))


def test_keypoints_are_read_after_arrays_of_a_later_version():
    sent = message(posed(seen(3)), "none", arrays=("keypoints",), keypoints=COCO_PERSON)
    parts = encode(sent)
    fields = msgspec.msgpack.decode(parts[1]) | {"arrays": ["colours", "keypoints"]}
    found = decode(
        [parts[0], msgspec.msgpack.encode(fields), parts[2] + bytes(36), *parts[3:], b"later"]
    )
    assert (found.instances.keypoints == sent.instances.keypoints).all()


def test_arrays_of_a_later_version_are_ignored():
    parts = encode(message(seen(3), "none"))
    fields = msgspec.msgpack.decode(parts[1]) | {"arrays": ["colours", "track_ids"]}
    found = decode([parts[0], msgspec.msgpack.encode(fields), parts[2] + bytes(36), parts[3]])
    assert found.instances.track_ids is None


@pytest.mark.parametrize("form", FORMATS)
def test_a_reader_that_knows_only_the_offset_tables_reads_the_same(form):
    instances = seen(5)
    _, header, arrays, masks = encode(message(instances, form))
    fields = msgspec.msgpack.decode(header)
    n = fields["count"]
    assert struct.unpack_from(f"<{4 * n}f", arrays, 0) == tuple(instances.boxes.reshape(-1))
    assert struct.unpack_from(f"<{n}f", arrays, 16 * n) == tuple(instances.scores)
    assert struct.unpack_from(f"<{n}i", arrays, 20 * n) == tuple(instances.labels)
    if form == "crop_u8":
        assert masks[784 * 3 + 28 * 14 + 9] == instances.masks[3, 14, 9]
    elif form == "crop_bits":
        bit = 28 * 14 + 9
        assert masks[98 * 3 + bit // 8] >> (7 - bit % 8) & 1 == (instances.masks[3, 14, 9] >= 128)
    elif form == "coco_rle":
        lengths = struct.unpack_from(f"<{n}I", masks, 0)
        start = 4 * n + sum(lengths[:3])
        assert masks[start : start + lengths[3]].decode() == instances.rle(3)["counts"]
    elif form == "polygon":
        rings = struct.unpack_from(f"<{n}I", masks, 0)
        points = struct.unpack_from(f"<{sum(rings)}I", masks, 4 * n)
        start = 4 * (n + sum(rings)) + 8 * sum(points[: sum(rings[:3])])
        assert struct.unpack_from("<2f", masks, start) == tuple(instances.polygons(3)[0][0])
    else:
        assert masks == b""


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("count", [0, 1, 7])
def test_what_is_encoded_decodes_to_the_same(form, count):
    sent = message(seen(count), form)
    got = decode(encode(sent))
    assert (got.source, got.header, got.jpeg) == (sent.source, sent.header, None)
    assert np.array_equal(got.instances.boxes, sent.instances.boxes)
    assert np.array_equal(got.instances.scores, sent.instances.scores)
    assert np.array_equal(got.instances.labels, sent.instances.labels)
    if form == "crop_u8":
        assert np.array_equal(got.instances.masks, sent.instances.masks)
    elif form == "none":
        assert got.instances.masks is None
    else:
        assert len(got.instances.masks) == count
    if form == "coco_rle":
        for i in range(count):
            assert np.array_equal(got.instances.mask(i), sent.instances.mask(i))


def test_a_message_that_was_decoded_can_be_sent_on():
    for form in ("coco_rle", "polygon"):
        parts = encode(message(seen(4), form))
        assert encode(decode(parts)) == parts
    relayed = decode(encode(message(seen(4), "polygon")))
    encode(message(relayed.instances, "coco_rle"))
    with pytest.raises(WireError, match="crop"):
        encode(message(relayed.instances, "crop_u8"))


def test_a_hundred_instances_stay_within_their_size_limit():
    for form, most in (("crop_u8", 82_000), ("crop_bits", 13_000)):
        assert sum(map(len, encode(message(seen(100), form)))) <= most


def test_boxes_are_clipped_to_the_image():
    instances = seen(1)
    instances.boxes[0] = [-0.5, 3, 640.25, 480.5]
    assert decode(encode(message(instances, "none"))).instances.boxes.tolist() == [[0, 3, 640, 480]]


def test_a_writer_cannot_send_what_a_reader_would_refuse():
    instances = seen(2)
    with pytest.raises(WireError, match="count"):
        encode(message(instances, "none", count=3))
    instances.boxes[1, 2] = np.nan
    with pytest.raises(WireError, match="box"):
        encode(message(instances, "none"))


def test_unknown_header_keys_parts_and_arrays_are_ignored():
    parts = encode(message(seen(3), "crop_bits"))
    header = msgspec.msgpack.decode(parts[1])
    parts[1] = msgspec.msgpack.encode(header | {"weather": {"rain": True}})
    parts[2] += b"\0" * 12
    got = decode([*parts, b"jpeg", b"something new"])
    assert len(got.instances) == 3
    assert got.jpeg == b"jpeg"


@pytest.mark.parametrize(
    ("part", "value"),
    [
        (0, b"v2/cam1/instances"),
        (0, b"v1/cam1/unknown"),
        (0, b"v1/cam1"),
        (0, b"v1/../instances"),
        (0, b"v1/c\xffm/instances"),
        (1, b""),
        (1, b"\x91" * 5000),
        (1, b"\xdf\xff\xff\xff\xff"),
        (2, b""),
        (2, struct.pack("<12f2i", *[0, 0, 9, 9, 5, 5, 4, 6, 0.5, 0.5], 0, 0, 1, 1)[:48]),
        (3, b""),
        (3, b"\xff" * 2000),
    ],
)
@pytest.mark.parametrize("form", ["crop_u8", "coco_rle", "polygon"])
def test_a_malformed_part_is_refused(form, part, value):
    parts = encode(message(seen(2), form))
    parts[part] = value
    with pytest.raises(WireError):
        decode(parts)


@pytest.mark.parametrize(
    "change",
    [
        {"count": 2**62},
        {"count": -1},
        {"width": 0},
        {"width": 16385},
        {"height": 2**63},
        {"masks": "bitmap"},
        {"publisher": "zz"},
        {"seq": 1.5},
        {"seq": None},
        {"drops": {"decode": {"replaced": -1}}},
        {"stage_ms": {"decode": "fast"}},
    ],
    ids=str,
)
def test_a_malformed_header_is_refused(change):
    parts = encode(message(seen(2), "none"))
    parts[1] = msgspec.msgpack.encode(msgspec.msgpack.decode(parts[1]) | change)
    with pytest.raises(WireError):
        decode(parts)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 641.0])
def test_an_outline_that_leaves_the_image_is_refused(value):
    ring = np.array([[1, 1], [9, 1], [9, 9]], dtype=np.float32)
    one = seen(1)
    masks = PolygonMasks(((ring,),))
    parts = encode(
        message(Instances(640, 480, one.boxes, one.scores, one.labels, masks), "polygon")
    )
    decode(parts)
    parts[3] = parts[3][:-8] + struct.pack("<2f", value, 5)
    with pytest.raises(WireError, match="point"):
        decode(parts)


def use(found):
    """Use a decoded message in every way that a subscriber can."""
    if isinstance(found, EventMessage):
        return
    for i in range(len(found.instances)):
        if found.instances.masks is not None:
            found.instances.patch(i)
            found.instances.polygons(i)
    found.instances.to_coco()


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes_are_a_message_or_a_wire_error(parts):
    for head in ([], [b"v1/cam1/instances"], [b"v1/cam1/event"]):
        with contextlib.suppress(WireError):
            use(decode([*head, *parts]))


VALID = [parts_of(path) for path in GOLDEN]


@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_a_message_with_wrong_bytes_is_a_message_or_a_wire_error(data):
    parts = [bytearray(part) for part in data.draw(st.sampled_from(VALID))]
    for _ in range(data.draw(st.integers(1, 4))):
        part = data.draw(st.sampled_from(parts))
        at = data.draw(st.integers(0, len(part)))
        match data.draw(st.sampled_from(["change", "cut", "insert"])):
            case "change":
                new = data.draw(st.binary(min_size=1, max_size=4))
                part[at : at + len(new)] = new
            case "cut":
                del part[at:]
            case "insert":
                part[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    with contextlib.suppress(WireError):
        use(decode([bytes(part) for part in parts]))


values = st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_header_with_wrong_values_is_a_header_or_a_wire_error(data):
    parts = list(data.draw(st.sampled_from(VALID)))
    header = msgspec.msgpack.decode(parts[1])
    for key in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3)):
        header[key] = data.draw(
            values
            | st.lists(values, max_size=2)
            | st.dictionaries(st.text(max_size=3), values, max_size=2)
        )
    parts[1] = msgspec.msgpack.encode(header)
    with contextlib.suppress(WireError):
        use(decode(parts))


@settings(max_examples=300, deadline=None)
@given(
    count=st.sampled_from([0, 1, 2]),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "seq": st.integers(-1, 2**64 - 1),
            "publisher": st.text(max_size=20),
            "labels": st.text(max_size=70),
            "clock": st.text(max_size=70),
            "width": st.integers(-1, 40_000),
            "dropped_before": st.integers(-2, 2**64 - 1),
            "stage_ms": st.dictionaries(st.text(max_size=3), st.floats() | st.text(max_size=1)),
            "masks": st.sampled_from([*FORMATS, "bitmap"]),
        },
    ),
)
def test_what_is_encoded_is_never_refused_by_a_reader(count, changes):
    sent = message(seen(count, width=changes.get("width", 640)), changes.pop("masks", "none"))
    sent = InstancesMessage(
        sent.source, msgspec.structs.replace(sent.header, **changes), sent.instances
    )
    try:
        parts = encode(sent)
    except WireError:
        return
    decode(parts)


def test_a_frame_wider_than_a_reader_takes_is_not_encoded():
    encode(message(seen(1, width=16384), "none"))
    with pytest.raises(WireError, match="width"):
        encode(message(seen(1, width=16385), "none"))


def test_too_few_parts_are_refused():
    parts = encode(message(seen(1), "none"))
    for count in range(4):
        with pytest.raises(WireError, match="parts"):
            decode(parts[:count])


def test_events_keep_their_data():
    header = EventHeader(
        publisher="00112233445566ff",
        seq=1,
        publish_ns=2,
        event="state",
        sent=9,
        data={"state": "running", "tries": 3, "list": [1, 2.5, None]},
    )
    assert decode(encode(EventMessage("cam1", header))) == EventMessage("cam1", header)
    assert decode_header(encode(EventMessage("cam1", header))) == ("cam1", header)


@pytest.mark.parametrize("name", ["cam1", "a", "0", "Gate-2.north_side", "x" * 64])
def test_legal_source_names_pass(name):
    assert check_source_name(name) == name
    assert topic(name, "event") == f"v1/{name}/event".encode()


@pytest.mark.parametrize(
    "name", ["", "a/b", ".hidden", "-x", "kamera ö", "gate 1", "x" * 65, "cam1\n", "cam\u0661"]
)
def test_a_source_name_that_no_topic_can_contain_is_refused_in_one_line(name):
    with pytest.raises(InputError, match="source name") as caught:
        check_source_name(name)
    assert "\n" not in str(caught.value)


def test_the_id_of_label_names_is_that_of_the_specification():
    # printf 'background\nperson\ncat' | sha256sum | cut -c1-8
    assert labels_id(["background", "person", "cat"]) == "431d001f"
    assert labels_id(["background", "cat", "person"]) != "431d001f"


def test_a_header_that_would_take_much_memory_is_refused_before_it_is_read():
    data = {"list": [None] * (1 << 20)}
    header = EventHeader(publisher="0" * 16, seq=0, publish_ns=0, event="x", data=data)
    with pytest.raises(WireError, match="longer than 1048576"):
        encode(EventMessage("cam1", header))
    with pytest.raises(WireError, match="longer than 1048576"):
        decode([b"v1/cam1/event", msgspec.msgpack.encode(header)])
