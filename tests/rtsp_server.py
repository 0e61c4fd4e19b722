"""A real RTSP camera for the tests, run by the system's Python, which has GStreamer's bindings.

    /usr/bin/python3 tests/rtsp_server.py --port 8554 --path /cam

It prints "ready" when it listens and serves until it is ended.
"""

import argparse

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--path", default="/cam")
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--height", type=int, default=240)
    parser.add_argument("--fps", type=int, default=30)
    parser.add_argument("--frames", type=int, default=-1, help="end the stream after so many")
    parser.add_argument("--codec", choices=["h264", "h265"], default="h264")
    parser.add_argument("--key-interval", type=int, help="pictures; half a second's by default")
    parser.add_argument("--credentials", help="user:password")
    arguments = parser.parse_args()

    Gst.init(None)
    server = GstRtspServer.RTSPServer.new()
    server.set_address("127.0.0.1")
    server.set_service(str(arguments.port))
    camera = GstRtspServer.RTSPMediaFactory.new()
    camera.set_launch(
        f"( videotestsrc is-live=true pattern=ball num-buffers={arguments.frames} "
        f"! video/x-raw,width={arguments.width},height={arguments.height},"
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
