// Reads maskcast's messages (docs/wire.md) and prints one JSON line per frame: the area of each mask,
// and the keypoints (x, y, score) if poses are estimated. Malformed messages are reported and skipped.
//
//   g++ -std=c++17 -O2 reader.cpp -lzmq -o reader    (Debian: libzmq3-dev nlohmann-json3-dev)
//   ./reader tcp://127.0.0.1:5555                    until a source has ended
//   ./reader ../../tests/golden/instances_crop_u8.json
#include <zmq.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

using Bytes = std::vector<uint8_t>;
using Mask = std::vector<uint8_t>;  // 1 where the object is, width * height, row by row

void require(bool is_true, const std::string& what) {
    if (!is_true) throw std::runtime_error("malformed message: " + what);
}

template <typename T>
T read(const Bytes& part, size_t offset) {  // the machine must be little-endian, as the wire is
    require(offset + sizeof(T) <= part.size(), "a part is too short");
    T value;
    std::memcpy(&value, part.data() + offset, sizeof(T));
    return value;
}

// From a crop to pixels: a border of zeros, a grown box, bilinear with half-pixel centres.
Mask paste(const uint8_t* crop, const float box[4], int width, int height) {
    const float grow = 30.0f / 28.0f;
    const float cx = (box[0] + box[2]) * 0.5f, cy = (box[1] + box[3]) * 0.5f;
    const float hw = (box[2] - box[0]) * 0.5f * grow, hh = (box[3] - box[1]) * 0.5f * grow;
    const int x1 = int(cx - hw), y1 = int(cy - hh), x2 = int(cx + hw), y2 = int(cy + hh);
    const int w = std::max(x2 - x1 + 1, 1), h = std::max(y2 - y1 + 1, 1);
    auto cell = [&](int r, int c) {
        return r < 1 || r > 28 || c < 1 || c > 28 ? 0.0f : float(crop[28 * (r - 1) + c - 1]);
    };
    Mask mask(size_t(width) * height, 0);
    for (int y = std::max(y1, 0); y < std::min(y1 + h, height); ++y) {
        const float v = std::clamp(30.0f * (y - y1 + 0.5f) / h - 0.5f, 0.0f, 29.0f);
        const int r = int(v);
        for (int x = std::max(x1, 0); x < std::min(x1 + w, width); ++x) {
            const float u = std::clamp(30.0f * (x - x1 + 0.5f) / w - 0.5f, 0.0f, 29.0f);
            const int c = int(u);
            const float top = cell(r, c) * (1 - (u - c)) + cell(r, c + 1) * (u - c);
            const float bottom = cell(r + 1, c) * (1 - (u - c)) + cell(r + 1, c + 1) * (u - c);
            mask[size_t(y) * width + x] = top * (1 - (v - r)) + bottom * (v - r) > 127.5f;
        }
    }
    return mask;
}

Mask run_lengths(const uint8_t* code, size_t length, int width, int height) {
    Mask mask(size_t(width) * height, 0);
    std::vector<int64_t> runs;
    size_t at = 0, pixel = 0;
    while (at < length) {
        int64_t value = 0;
        int shift = 0;
        int group;
        do {
            require(at < length && shift <= 55 && code[at] >= 48 && code[at] < 112, "a run length");
            group = code[at++] - 48;
            value |= int64_t(group & 31) << shift;
            shift += 5;
        } while (group & 32);
        if (group & 16) value -= int64_t(1) << shift;
        if (runs.size() > 2) value += runs[runs.size() - 2];
        require(value >= 0 && pixel + value <= mask.size(), "a run length");
        for (int64_t i = 0; i < value; ++i, ++pixel)  // down the columns
            mask[pixel % height * width + pixel / height] = runs.size() % 2;
        runs.push_back(value);
    }
    require(pixel == mask.size(), "run lengths that do not fill the frame");
    return mask;
}

void flip_ring(Mask& mask, const std::vector<float>& ring, int width, int height) {
    const size_t n = ring.size() / 2;  // even-odd: each ring flips what lies inside it
    for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x) {
            bool inside = false;
            for (size_t i = 0, j = n - 1; i < n; j = i++) {
                const float ax = ring[2 * i], ay = ring[2 * i + 1];
                const float bx = ring[2 * j], by = ring[2 * j + 1];
                if ((ay > y + 0.5f) != (by > y + 0.5f) &&
                    x + 0.5f < (bx - ax) * (y + 0.5f - ay) / (by - ay) + ax)
                    inside = !inside;
            }
            mask[size_t(y) * width + x] ^= inside;
        }
}

std::vector<Mask> read_masks(const nlohmann::json& header, const Bytes& arrays, const Bytes& part) {
    const int width = header.at("width"), height = header.at("height");
    const size_t count = header.at("count");
    const std::string format = header.at("masks");
    std::vector<Mask> masks;
    size_t code = 4 * count, ring = 4 * count, points = 4 * count;
    if (format == "polygon")
        for (size_t i = 0; i < count; ++i) points += 4 * read<uint32_t>(part, 4 * i);
    for (size_t i = 0; i < count && format != "none"; ++i) {
        const float box[4] = {read<float>(arrays, 16 * i), read<float>(arrays, 16 * i + 4),
                              read<float>(arrays, 16 * i + 8), read<float>(arrays, 16 * i + 12)};
        if (format == "crop_u8") {
            read<uint8_t>(part, 784 * i + 783);
            masks.push_back(paste(part.data() + 784 * i, box, width, height));
        } else if (format == "crop_bits") {
            uint8_t crop[784];
            for (int b = 0; b < 784; ++b)
                crop[b] = read<uint8_t>(part, 98 * i + b / 8) >> (7 - b % 8) & 1 ? 255 : 0;
            masks.push_back(paste(crop, box, width, height));
        } else if (format == "coco_rle") {
            const uint32_t length = read<uint32_t>(part, 4 * i);
            masks.push_back(run_lengths(part.data() + code, length, width, height));
            code += length;
        } else if (format == "polygon") {
            Mask mask(size_t(width) * height, 0);
            for (uint32_t rings = read<uint32_t>(part, 4 * i); rings > 0; --rings, ring += 4) {
                std::vector<float> corners(2 * size_t(read<uint32_t>(part, ring)));
                for (float& corner : corners) corner = read<float>(part, points), points += 4;
                flip_ring(mask, corners, width, height);
            }
            masks.push_back(mask);
        }
    }
    return masks;
}

nlohmann::json read_keypoints(size_t names, size_t count, const Bytes& part) {
    auto keypoints = nlohmann::json::array();
    for (size_t i = 0; i < count; ++i) {
        auto pose = nlohmann::json::array();
        for (size_t at = 12 * names * i; at < 12 * names * (i + 1); at += 12)
            pose.push_back({read<float>(part, at), read<float>(part, at + 4), read<float>(part, at + 8)});
        keypoints.push_back(pose);
    }
    return keypoints;
}

bool names(const nlohmann::json& header, const std::string& array) {
    const auto arrays = header.value("arrays", nlohmann::json::array());
    return std::find(arrays.begin(), arrays.end(), array) != arrays.end();
}

nlohmann::json read_header(const std::vector<Bytes>& parts, bool is_event) {
    const auto header = nlohmann::json::from_msgpack(parts.at(1));  // bytes behind it are an error
    require(header.is_object(), "the header");
    header.dump();  // an error if a string is not UTF-8
    static const std::regex id("[0-9a-f]{16}");
    require(std::regex_match(header.at("publisher").get<std::string>(), id), "publisher");
    std::vector<std::string> numbers{"seq", "publish_ns"};
    if (!is_event) numbers.insert(numbers.end(), {"index", "capture_ns", "width", "height", "count"});
    for (const auto& key : numbers) require(header.at(key).is_number_unsigned(), key);
    if (is_event) return header;
    for (const char* key : {"width", "height"})
        require(header.at(key) >= 1 && header.at(key) <= 16384, key);
    const std::string format = header.at("masks");
    for (const char* known : {"none", "crop_u8", "crop_bits", "coco_rle", "polygon"})
        if (format == known) {
            const size_t each = names(header, "track_ids") ? 28 : 24;
            require(header.at("count") <= parts.at(2).size() / each, "part 2 is too short");
            return header;
        }
    throw std::runtime_error("malformed message: masks");
}

void check_arrays(const nlohmann::json& header, const Bytes& part) {
    const size_t count = header.at("count");
    const float width = header.at("width"), height = header.at("height");
    for (size_t i = 0; i < count; ++i) {  // comparisons with NaN are false
        const float x1 = read<float>(part, 16 * i), y1 = read<float>(part, 16 * i + 4);
        const float x2 = read<float>(part, 16 * i + 8), y2 = read<float>(part, 16 * i + 12);
        require(0 <= x1 && x1 <= x2 && x2 <= width && 0 <= y1 && y1 <= y2 && y2 <= height, "a box");
        const float score = read<float>(part, 16 * count + 4 * i);
        require(0 <= score && score <= 1, "a score");
        require(read<int32_t>(part, 20 * count + 4 * i) >= 0, "a label");
    }
}

// The length of part 3 follows from the number of instances, or from the tables in it.
void check_masks(const nlohmann::json& header, const Bytes& part) {
    const size_t count = header.at("count");
    const float width = header.at("width"), height = header.at("height");
    const std::string format = header.at("masks");
    size_t length = format == "none"        ? 0
                    : format == "crop_u8"   ? 784 * count
                    : format == "crop_bits" ? 98 * count
                                            : 4 * count;
    if (format == "coco_rle")
        for (size_t i = 0; i < count; ++i) length += read<uint32_t>(part, 4 * i);
    if (format == "polygon") {
        size_t rings = 0, points = 0;
        for (size_t i = 0; i < count; ++i) rings += read<uint32_t>(part, 4 * i);
        for (size_t i = 0; i < rings; ++i) {
            const uint32_t corners = read<uint32_t>(part, 4 * (count + i));
            require(corners >= 3, "a ring");
            points += corners;
        }
        length += 4 * rings + 8 * points;
        require(part.size() == length, "the length of part 3");
        for (size_t at = 4 * (count + rings); at < length; at += 8) {
            const float x = read<float>(part, at), y = read<float>(part, at + 4);
            require(0 <= x && x <= width && 0 <= y && y <= height, "a point");
        }
    }
    require(part.size() == length, "the length of part 3");
}

void check_keypoints(const nlohmann::json& header, const Bytes& part) {
    const size_t count = header.at("count"), k = header.at("keypoints").at("names").size();
    const float width = header.at("width"), height = header.at("height");
    for (const auto& ends : header.at("keypoints").value("skeleton", nlohmann::json::array()))
        for (const auto& end : ends) require(end.is_number_unsigned() && end < k, "skeleton");
    require(part.size() == 12 * k * count, "the length of part 5");
    for (size_t at = 0; at < part.size(); at += 12) {
        const float x = read<float>(part, at), y = read<float>(part, at + 4);
        const float score = read<float>(part, at + 8);
        require(0 <= x && x <= width && 0 <= y && y <= height, "a keypoint");
        require(0 <= score && score <= 1, "a keypoint's score");
    }
}

// Returns false when the message says that its source has ended.
bool show(const std::vector<Bytes>& parts) {
    const std::string topic(parts.at(0).begin(), parts.at(0).end());
    static const std::regex form("v1/[A-Za-z0-9][A-Za-z0-9._-]{0,63}/(instances|event)");
    std::smatch found;
    require(std::regex_match(topic, found, form), "the topic");
    const bool is_event = found[1] == "event";
    require(parts.size() >= (is_event ? 2 : 4), "too few parts");
    const auto header = read_header(parts, is_event);
    if (is_event) return header.at("event") != "ended";
    check_arrays(header, parts[2]);
    check_masks(header, parts[3]);
    auto areas = nlohmann::json::array();
    for (const Mask& mask : read_masks(header, parts[2], parts[3]))
        areas.push_back(std::count(mask.begin(), mask.end(), 1));
    nlohmann::json shown{{"index", header.at("index")}, {"areas", areas}};
    if (names(header, "keypoints")) {
        require(parts.size() > 5, "keypoints without part 5");
        check_keypoints(header, parts[5]);
        shown["keypoints"] = read_keypoints(header.at("keypoints").at("names").size(),
                                            header.at("count"), parts[5]);
    }
    std::cout << shown << std::endl;
    return true;
}

// Messages of a later version, or of a faulty publisher, must not end the reader.
bool try_to_show(const std::vector<Bytes>& parts) try {
    return show(parts);
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return true;
}

int main(int, char** arguments) try {
    const std::string where = arguments[1] ? arguments[1] : "tcp://127.0.0.1:5555";
    if (where.find("://") == std::string::npos) {
        std::vector<Bytes> parts;
        std::ifstream file(where);
        const auto golden = nlohmann::json::parse(file);
        for (const std::string hex : golden.at("parts")) {
            Bytes part;
            for (size_t i = 0; i < hex.size(); i += 2)
                part.push_back(uint8_t(std::stoi(hex.substr(i, 2), nullptr, 16)));
            parts.push_back(part);
        }
        show(parts);
        return 0;
    }
    void* context = zmq_ctx_new();
    void* socket = zmq_socket(context, ZMQ_SUB);
    const int high_water_mark = 10000;
    zmq_setsockopt(socket, ZMQ_RCVHWM, &high_water_mark, sizeof high_water_mark);
    zmq_setsockopt(socket, ZMQ_SUBSCRIBE, "v1/", 3);
    if (zmq_connect(socket, where.c_str())) throw std::runtime_error(zmq_strerror(zmq_errno()));
    std::vector<Bytes> parts;
    do {
        parts.clear();
        for (bool is_last = false; !is_last;) {
            zmq_msg_t part;
            zmq_msg_init(&part);
            if (zmq_msg_recv(&part, socket, 0) < 0) throw std::runtime_error("cannot receive");
            const auto* data = static_cast<const uint8_t*>(zmq_msg_data(&part));
            parts.emplace_back(data, data + zmq_msg_size(&part));
            is_last = !zmq_msg_more(&part);
            zmq_msg_close(&part);
        }
    } while (try_to_show(parts));
    zmq_close(socket);
    zmq_ctx_term(context);
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
}
