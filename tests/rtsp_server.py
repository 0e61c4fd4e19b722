"""A real RTSP camera for the tests, run by the system's Python, which has GStreamer's bindings.

    /usr/bin/python3 tests/rtsp_server.py --port 8554 --path /cam

It prints "ready" when it listens, and serves until it is killed.
"""

import argparse

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402


def push_numbered(media: GstRtspServer.RTSPMedia, arguments: argparse.Namespace) -> None:
    """Send frames 0, 1, 2 ... that carry their number for ``benchmarks/numbered_frames.py``.

    32 blocks, 8 per row, dark for 0 and bright for 1: 4 bits id, 24 bits number, 4 bits checksum.
    """
    source = media.get_element().get_by_name("frames")
    width, height, number = arguments.width, arguments.height, 0

    def push(source: Gst.Element, _: int) -> None:
        nonlocal number
        if number == arguments.frames:
            source.emit("end-of-stream")
            return
        value = arguments.numbered << 24 | number
        digits = [value >> shift & 15 for shift in range(0, 28, 4)]
        bits = f"{value << 4 | sum(digits) % 16:032b}"
        rows = [
            b"".join(bytes([200 if bit == "1" else 50]) * (width // 8) for bit in bits[i : i + 8])
            for i in range(0, 32, 8)
        ]
        luma = b"".join(row * (height // 4) for row in rows)
        buffer = Gst.Buffer.new_wrapped(luma + bytes([128]) * (width * height // 2))
        buffer.pts = number * Gst.SECOND // arguments.fps
        buffer.duration = Gst.SECOND // arguments.fps
        number += 1
        source.emit("push-buffer", buffer)

    source.connect("need-data", push)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/cam")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--height", type=int, default=240)
    parser.add_argument("--fps", type=int, default=30)
    parser.add_argument("--frames", type=int, default=-1, help="end the stream after N frames")
    parser.add_argument("--codec", choices=["h264", "h265"], default="h264")
    parser.add_argument(
        "--key-interval", type=int, help="key frame every N frames (default: 0.5 s)"
    )
    parser.add_argument("--credentials", help="user:password")
    parser.add_argument("--numbered", type=int, help="send frames that carry this id and a number")
    arguments = parser.parse_args()

    Gst.init(None)
    server = GstRtspServer.RTSPServer.new()
    server.set_address("127.0.0.1")
    server.set_service(str(arguments.port))
    camera = GstRtspServer.RTSPMediaFactory.new()
    source = f"videotestsrc is-live=true pattern=ball num-buffers={arguments.frames} ! video/x-raw"
    if arguments.numbered is not None:
        source = "appsrc name=frames is-live=true format=time caps=video/x-raw,format=I420"
        camera.connect("media-configure", lambda _, media: push_numbered(media, arguments))
    camera.set_launch(
        f"( {source},width={arguments.width},height={arguments.height},"
        f"framerate={arguments.fps}/1 "
        f"! x{arguments.codec[1:]}enc tune=zerolatency speed-preset=ultrafast "
        f"key-int-max={arguments.key_interval or arguments.fps // 2} "
        f"! rtp{arguments.codec}pay name=pay0 pt=96 config-interval=1 )"
    )
    camera.set_shared(True)
    if arguments.credentials:
        user, password = arguments.credentials.split(":")
        access = GstRtspServer.RTSPAuth.new()
        token = GstRtspServer.RTSPToken.new()
        token.set_string("media.factory.role", user)
        access.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
        camera.add_role_from_structure(
            Gst.Structure.new_from_string(
                f"{user}, media.factory.access=(boolean)true, media.factory.construct=(boolean)true"
            )
        )
        server.set_auth(access)
    server.get_mount_points().add_factory(arguments.path, camera)
    if server.attach(None) == 0:
        raise SystemExit(f"port {arguments.port} cannot be bound")
    print("ready", flush=True)  # noqa: T201
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
