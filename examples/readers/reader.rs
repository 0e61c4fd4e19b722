// Reads maskcast's messages (docs/wire.md) and prints one JSON line per frame: the area of each mask,
// and the keypoints (x, y, score) if poses are estimated. Malformed messages are reported and skipped.
//
//   rustc --edition 2021 -O reader.rs               Rust 1.65, no crates, libzmq (Debian: libzmq3-dev)
//   ./reader tcp://127.0.0.1:5555                   until a source has ended
//   ./reader ../../tests/golden/instances_crop_u8.json
use std::ffi::{c_char, c_int, c_void, CString};
use std::process::ExitCode;

type Result<T> = std::result::Result<T, String>;

fn require(is_true: bool, what: &str) -> Result<()> {
    if is_true { Ok(()) } else { Err(format!("malformed message: {what}")) }
}

// ---- msgpack, as far as headers use it

enum Value {
    Unsigned(u64),
    Text(String),
    List(Vec<Value>),
    Map(Vec<(String, Value)>),
    Other,
}

impl Value {
    fn get(&self, key: &str) -> Result<&Value> {
        let Value::Map(pairs) = self else { return Err("malformed message: no map".into()) };
        let found = pairs.iter().find(|(name, _)| name == key);
        found.map(|(_, value)| value).ok_or(format!("malformed message: {key} is absent"))
    }

    fn number(&self, key: &str) -> Result<u64> {
        match self.get(key)? {
            Value::Unsigned(number) => Ok(*number),
            _ => Err(format!("malformed message: {key}")),
        }
    }

    fn text(&self, key: &str) -> Result<&str> {
        match self.get(key)? {
            Value::Text(text) => Ok(text),
            _ => Err(format!("malformed message: {key}")),
        }
    }

    fn list(&self) -> &[Value] {
        if let Value::List(values) = self { values } else { &[] }
    }

    fn names(&self, array: &str) -> bool {
        let arrays = self.get("arrays").map(Value::list).unwrap_or(&[]);
        arrays.iter().any(|name| matches!(name, Value::Text(text) if text == array))
    }
}

fn take<'a>(data: &mut &'a [u8], count: usize) -> Result<&'a [u8]> {
    require(count <= data.len(), "the header ends early")?;
    let (taken, rest) = data.split_at(count);
    *data = rest;
    Ok(taken)
}

fn unsigned(data: &mut &[u8], bytes: usize) -> Result<u64> {
    Ok(take(data, bytes)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn unpack(data: &mut &[u8], depth: usize) -> Result<Value> {
    require(depth < 16, "the header is nested too deeply")?;
    let kind = unsigned(data, 1)? as u8;
    let (is, count) = match kind {
        0x00..=0x7f => return Ok(Value::Unsigned(u64::from(kind))),
        0x80..=0x8f => ('m', u64::from(kind & 15)),
        0x90..=0x9f => ('l', u64::from(kind & 15)),
        0xa0..=0xbf => ('t', u64::from(kind & 31)),
        0xc0 | 0xc2 | 0xc3 | 0xe0..=0xff => return Ok(Value::Other), // nil, bool, negative
        0xc4..=0xc6 => ('o', unsigned(data, 1 << (kind - 0xc4))?),
        0xca => ('o', 4),
        0xcb => ('o', 8),
        0xcc..=0xcf => return unsigned(data, 1 << (kind - 0xcc)).map(Value::Unsigned),
        0xd0..=0xd3 => ('s', 1 << (kind - 0xd0)),
        0xd9..=0xdb => ('t', unsigned(data, 1 << (kind - 0xd9))?),
        0xdc | 0xdd => ('l', unsigned(data, 2 << (kind - 0xdc))?),
        0xde | 0xdf => ('m', unsigned(data, 2 << (kind - 0xde))?),
        _ => return Err("malformed message: an extension type".into()),
    };
    let count = usize::try_from(count).map_err(|error| error.to_string())?;
    Ok(match is {
        't' => Value::Text(text(take(data, count)?)?),
        'l' => Value::List((0..count).map(|_| unpack(data, depth + 1)).collect::<Result<_>>()?),
        'm' => {
            let mut pairs = Vec::new();
            for _ in 0..count {
                let Value::Text(key) = unpack(data, depth + 1)? else {
                    return Err("malformed message: a key is no string".into());
                };
                pairs.push((key, unpack(data, depth + 1)?));
            }
            Value::Map(pairs)
        }
        's' => {
            // A packer may write a positive number as a signed one.
            let number = unsigned(data, count)?;
            if number >> (8 * count - 1) == 0 { Value::Unsigned(number) } else { Value::Other }
        }
        _ => take(data, count).map(|_| Value::Other)?,
    })
}

fn text(bytes: &[u8]) -> Result<String> {
    String::from_utf8(bytes.to_vec()).map_err(|_| "malformed message: not UTF-8".into())
}

// ---- numbers in the other parts

fn float(part: &[u8], at: usize) -> Result<f32> {
    Ok(f32::from_bits(uint(part, at)?))
}

fn uint(part: &[u8], at: usize) -> Result<u32> {
    let bytes = part.get(at..at + 4).ok_or("malformed message: a part is too short")?;
    Ok(u32::from_le_bytes(bytes.try_into().unwrap()))
}

fn within(value: f32, low: f32, high: f32, what: &str) -> Result<()> {
    require(low <= value && value <= high, what) // false for NaN
}

// ---- masks: one byte for each pixel, row by row

struct Size {
    width: usize,
    height: usize,
}

// From a crop to pixels: a border of zeros, a grown box, bilinear with half-pixel centres.
fn paste(crop: impl Fn(usize) -> f64, b: [f32; 4], size: &Size) -> usize {
    let grow = 30f32 / 28f32;
    let grown = |low: f32, high: f32| {
        let (centre, half) = ((low + high) * 0.5, (high - low) * 0.5 * grow);
        ((centre - half) as i64, (centre + half) as i64)
    };
    let ((x1, x2), (y1, y2)) = (grown(b[0], b[2]), grown(b[1], b[3]));
    let (w, h) = ((x2 - x1 + 1).max(1), (y2 - y1 + 1).max(1));
    let cell = |r: i64, c: i64| match (r, c) {
        (1..=28, 1..=28) => crop((28 * (r - 1) + c - 1) as usize),
        _ => 0.0,
    };
    let place = |i: i64, n: i64| ((30.0 * (i as f64 + 0.5)) / n as f64 - 0.5).clamp(0.0, 29.0);
    let mut area = 0;
    for y in y1.max(0)..(y1 + h).min(size.height as i64) {
        let v = place(y - y1, h);
        let (r, dv) = (v as i64, v.fract());
        for x in x1.max(0)..(x1 + w).min(size.width as i64) {
            let u = place(x - x1, w);
            let (c, du) = (u as i64, u.fract());
            let top = cell(r, c) * (1.0 - du) + cell(r, c + 1) * du;
            let bottom = cell(r + 1, c) * (1.0 - du) + cell(r + 1, c + 1) * du;
            area += usize::from(top * (1.0 - dv) + bottom * dv > 127.5);
        }
    }
    area
}

fn run_lengths(code: &[u8], size: &Size) -> Result<usize> {
    let mut runs: Vec<i64> = Vec::new(); // down the columns, outside and inside in turn
    let (mut at, mut pixel, mut area) = (0, 0i64, 0);
    while at < code.len() {
        let (mut value, mut shift) = (0i64, 0);
        loop {
            let in_range = at < code.len() && shift <= 55 && (48..112).contains(&code[at]);
            require(in_range, "a run length")?;
            let group = i64::from(code[at] - 48);
            at += 1;
            value |= (group & 31) << shift;
            shift += 5;
            if group & 32 == 0 {
                value -= if group & 16 != 0 { 1 << shift } else { 0 };
                break;
            }
        }
        if runs.len() > 2 {
            value += runs[runs.len() - 2];
        }
        pixel += value;
        require(value >= 0 && pixel <= (size.width * size.height) as i64, "a run length")?;
        area += if runs.len() % 2 == 1 { value as usize } else { 0 };
        runs.push(value);
    }
    require(pixel == (size.width * size.height) as i64, "run lengths that do not fill the frame")?;
    Ok(area)
}

// Even-odd: each ring flips what lies inside it.
fn inside(rings: &[Vec<(f64, f64)>], size: &Size) -> usize {
    let mut area = 0;
    for y in (0..size.height).map(|y| y as f64 + 0.5) {
        for x in (0..size.width).map(|x| x as f64 + 0.5) {
            let mut is_inside = false;
            for ring in rings {
                for (i, &(ax, ay)) in ring.iter().enumerate() {
                    let (bx, by) = ring[(i + ring.len() - 1) % ring.len()];
                    is_inside ^= (ay > y) != (by > y) && x < (bx - ax) * (y - ay) / (by - ay) + ax;
                }
            }
            area += usize::from(is_inside);
        }
    }
    area
}

fn areas(header: &Value, count: usize, arrays: &[u8], part: &[u8]) -> Result<Vec<usize>> {
    let (width, height) = (header.number("width")? as usize, header.number("height")? as usize);
    let (size, format) = (Size { width, height }, header.text("masks")?);
    let rows = |each: usize| require(part.len() == each * count, "the length of part 3");
    let bounds = |i: usize| -> Result<[f32; 4]> {
        let at = 16 * i;
        Ok([float(arrays, at)?, float(arrays, at + 4)?, float(arrays, at + 8)?, float(arrays, at + 12)?])
    };
    match format {
        "none" => rows(0).map(|()| Vec::new()),
        "crop_u8" => {
            rows(784)?;
            let crop = |i: usize| move |b: usize| f64::from(part[784 * i + b]);
            (0..count).map(|i| Ok(paste(crop(i), bounds(i)?, &size))).collect()
        }
        "crop_bits" => {
            rows(98)?;
            let bit = |i: usize, b: usize| part[98 * i + b / 8] >> (7 - b % 8) & 1;
            let crop = |i: usize| move |b: usize| 255.0 * f64::from(bit(i, b));
            (0..count).map(|i| Ok(paste(crop(i), bounds(i)?, &size))).collect()
        }
        "coco_rle" => {
            let (mut at, mut found) = (4 * count, Vec::new());
            for i in 0..count {
                let end = at + uint(part, 4 * i)? as usize;
                let code = part.get(at..end).ok_or("malformed message: the length of part 3")?;
                found.push(run_lengths(code, &size)?);
                at = end;
            }
            require(at == part.len(), "the length of part 3")?;
            Ok(found)
        }
        _ => polygons(count, part, &size),
    }
}

fn polygons(count: usize, part: &[u8], size: &Size) -> Result<Vec<usize>> {
    let table = |i: usize| uint(part, 4 * i).map(|number| number as usize);
    let rings = (0..count).map(table).sum::<Result<usize>>()?;
    require(count + rings <= part.len() / 4, "the length of part 3")?;
    let points = (count..count + rings).map(table).sum::<Result<usize>>()?;
    require(part.len() == 4 * (count + rings) + 8 * points, "the length of part 3")?;
    let (mut ring, mut at, mut found) = (count, 4 * (count + rings), Vec::new());
    for i in 0..count {
        let mut of_one = Vec::new();
        for _ in 0..table(i)? {
            let mut corners = Vec::new();
            for _ in 0..table(ring)? {
                let (x, y) = (float(part, at)?, float(part, at + 4)?);
                within(x, 0.0, size.width as f32, "a point")?;
                within(y, 0.0, size.height as f32, "a point")?;
                corners.push((f64::from(x), f64::from(y)));
                at += 8;
            }
            require(corners.len() >= 3, "a ring")?;
            of_one.push(corners);
            ring += 1;
        }
        found.push(inside(&of_one, size));
    }
    Ok(found)
}

// ---- messages

fn check_arrays(header: &Value, count: usize, part: &[u8]) -> Result<()> {
    let (width, height) = (header.number("width")? as f32, header.number("height")? as f32);
    for i in 0..count {
        let at = 16 * i;
        let (x2, y2) = (float(part, at + 8)?, float(part, at + 12)?);
        within(float(part, at)?, 0.0, x2, "a box")?;
        within(float(part, at + 4)?, 0.0, y2, "a box")?;
        within(x2, 0.0, width, "a box")?;
        within(y2, 0.0, height, "a box")?;
        within(float(part, 16 * count + 4 * i)?, 0.0, 1.0, "a score")?;
        require(uint(part, 20 * count + 4 * i)? as i32 >= 0, "a label")?;
    }
    Ok(())
}

fn keypoints(header: &Value, count: usize, part: &[u8]) -> Result<String> {
    let described = header.get("keypoints")?;
    let k = described.get("names")?.list().len();
    require(k > 0 && part.len() == 12 * k * count, "the length of part 5")?;
    for end in described.get("skeleton").map(Value::list).unwrap_or(&[]).iter().flat_map(Value::list) {
        require(matches!(end, Value::Unsigned(end) if *end < k as u64), "skeleton")?;
    }
    let (width, height) = (header.number("width")? as f32, header.number("height")? as f32);
    let point = |i: usize| -> Result<[f64; 3]> {
        let (x, y, score) = (float(part, 12 * i)?, float(part, 12 * i + 4)?, float(part, 12 * i + 8)?);
        within(x, 0.0, width, "a keypoint")?;
        within(y, 0.0, height, "a keypoint")?;
        within(score, 0.0, 1.0, "a keypoint's score")?;
        Ok([x.into(), y.into(), score.into()])
    };
    let pose = |i: usize| (k * i..k * (i + 1)).map(point).collect::<Result<Vec<_>>>();
    Ok(format!(",\"keypoints\":{:?}", (0..count).map(pose).collect::<Result<Vec<_>>>()?))
}

fn check_topic(topic: &str) -> Result<bool> {
    let fields: Vec<&str> = topic.split('/').collect();
    let [version, source, kind] = fields[..] else { return Err("malformed message: the topic".into()) };
    let is_name = (1..=64).contains(&source.len())
        && source.starts_with(|first: char| first.is_ascii_alphanumeric())
        && source.chars().all(|sign| sign.is_ascii_alphanumeric() || "._-".contains(sign));
    require(version == "v1" && is_name && ["instances", "event"].contains(&kind), "the topic")?;
    Ok(kind == "event")
}

// Returns false when the message says that its source has ended.
fn show(parts: &[Vec<u8>]) -> Result<bool> {
    let is_event = check_topic(&text(parts.first().ok_or("malformed message: no part")?)?)?;
    require(parts.len() >= if is_event { 2 } else { 4 }, "too few parts")?;
    let mut rest = &parts[1][..];
    let header = unpack(&mut rest, 0)?;
    require(rest.is_empty(), "bytes behind the header")?;
    let publisher = header.text("publisher")?;
    let is_hexadecimal = |sign: char| matches!(sign, '0'..='9' | 'a'..='f');
    require(publisher.len() == 16 && publisher.chars().all(is_hexadecimal), "publisher")?;
    for key in ["seq", "publish_ns"] {
        header.number(key)?;
    }
    if is_event {
        return Ok(header.text("event")? != "ended");
    }
    header.number("capture_ns")?;
    for key in ["width", "height"] {
        require((1..=16384).contains(&header.number(key)?), key)?;
    }
    let known = ["none", "crop_u8", "crop_bits", "coco_rle", "polygon"];
    require(known.contains(&header.text("masks")?), "masks")?;
    let (count, each) = (header.number("count")?, if header.names("track_ids") { 28 } else { 24 });
    require(count <= parts[2].len() as u64 / each, "part 2 is too short")?;
    let count = count as usize;
    check_arrays(&header, count, &parts[2])?;
    let areas = areas(&header, count, &parts[2], &parts[3])?;
    let mut poses = String::new();
    if header.names("keypoints") {
        poses = keypoints(&header, count, parts.get(5).ok_or("malformed message: no part 5")?)?;
    }
    println!("{{\"index\":{},\"areas\":{areas:?}{poses}}}", header.number("index")?);
    Ok(true)
}

// ---- libzmq

#[repr(C, align(8))]
struct Message([u8; 64]);

#[link(name = "zmq")]
extern "C" {
    fn zmq_ctx_new() -> *mut c_void;
    fn zmq_socket(context: *mut c_void, kind: c_int) -> *mut c_void;
    fn zmq_setsockopt(socket: *mut c_void, option: c_int, value: *const c_void, size: usize) -> c_int;
    fn zmq_connect(socket: *mut c_void, endpoint: *const c_char) -> c_int;
    fn zmq_msg_init(message: *mut Message) -> c_int;
    fn zmq_msg_recv(message: *mut Message, socket: *mut c_void, flags: c_int) -> c_int;
    fn zmq_msg_data(message: *mut Message) -> *const u8;
    fn zmq_msg_size(message: *const Message) -> usize;
    fn zmq_msg_more(message: *const Message) -> c_int;
    fn zmq_msg_close(message: *mut Message) -> c_int;
}

const ZMQ_SUB: c_int = 2;
const ZMQ_SUBSCRIBE: c_int = 6;
const ZMQ_RCVHWM: c_int = 24;

fn receive(socket: *mut c_void) -> Result<Vec<Vec<u8>>> {
    let mut parts = Vec::new();
    loop {
        let mut message = Message([0; 64]);
        // SAFETY: the message is initialised before it is used, and its bytes are copied.
        let is_last = unsafe {
            zmq_msg_init(&mut message);
            if zmq_msg_recv(&mut message, socket, 0) < 0 {
                return Err("cannot receive".into());
            }
            let size = zmq_msg_size(&message);
            let data = zmq_msg_data(&mut message);
            parts.push(if size == 0 { Vec::new() } else { std::slice::from_raw_parts(data, size).to_vec() });
            let is_last = zmq_msg_more(&message) == 0;
            zmq_msg_close(&mut message);
            is_last
        };
        if is_last {
            return Ok(parts);
        }
    }
}

fn subscribe(endpoint: &str) -> Result<()> {
    let endpoint = CString::new(endpoint).map_err(|error| error.to_string())?;
    let high_water_mark: c_int = 10_000;
    // SAFETY: the pointers are valid during the calls; socket and context live until the end.
    let socket = unsafe {
        let socket = zmq_socket(zmq_ctx_new(), ZMQ_SUB);
        zmq_setsockopt(socket, ZMQ_RCVHWM, &high_water_mark as *const c_int as *const c_void, 4);
        zmq_setsockopt(socket, ZMQ_SUBSCRIBE, b"v1/".as_ptr() as *const c_void, 3);
        if zmq_connect(socket, endpoint.as_ptr()) != 0 {
            return Err(format!("cannot connect to {endpoint:?}"));
        }
        socket
    };
    loop {
        match show(&receive(socket)?) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(problem) => eprintln!("{problem}"), // must not end the reader
        }
    }
}

// Reads the parts of a golden message: its file is JSON, and holds them in hexadecimal.
fn read_golden(path: &str) -> Result<Vec<Vec<u8>>> {
    let json = std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))?;
    let list = json.split_once("\"parts\"").and_then(|(_, rest)| rest.split_once(']'));
    let (list, _) = list.ok_or(format!("{path}: no golden message"))?;
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    let part = |hex: &str| hex.as_bytes().chunks(2).map(byte).collect::<Option<Vec<u8>>>();
    let parts: Option<Vec<_>> = list.split('"').skip(1).step_by(2).map(part).collect();
    parts.ok_or(format!("{path}: no golden message"))
}

fn main() -> ExitCode {
    let given = std::env::args().nth(1).unwrap_or("tcp://127.0.0.1:5555".into());
    let result = if given.contains("://") {
        subscribe(&given)
    } else {
        read_golden(&given).and_then(|parts| show(&parts)).map(|_| ())
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}
