"""protos/assistant.proto: its generated modules are current, and its wire format is the original's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.conf import settings

from gateway_app.rpc.assistant_pb2 import DESCRIPTOR, Request, Response

PROTO = Path(settings.BASE_DIR) / "protos" / "assistant.proto"
GENERATED = ["assistant_pb2.py", "assistant_pb2.pyi", "assistant_pb2_grpc.py"]


def test_the_generated_modules_are_what_the_command_in_the_proto_makes(tmp_path: Path) -> None:
    match = re.search(r"^//   python (-m grpc_tools\.protoc .*)$", PROTO.read_text(), re.MULTILINE)
    assert match is not None
    argv = [sys.executable, *match[1].replace("_out=.", f"_out={tmp_path}").split()]
    subprocess.run(argv, cwd=settings.BASE_DIR, check=True, timeout=30)
    made = tmp_path / "gateway_app" / "rpc"
    assert sorted(path.name for path in made.iterdir()) == GENERATED
    for name in GENERATED:
        committed = Path(settings.BASE_DIR) / "gateway_app" / "rpc" / name
        assert (made / name).read_bytes() == committed.read_bytes(), f"{name} is stale: run the command in {PROTO.name}"


def test_names_numbers_and_types_are_the_original_s() -> None:
    string, int32, bytes_, message = 9, 5, 12, 11
    fields = {
        kind.name: {field.name: (field.number, field.type, field.is_repeated) for field in kind.fields}
        for kind in DESCRIPTOR.message_types_by_name.values()
    }
    assert DESCRIPTOR.package == "assistant"
    assert fields == {
        "Request": {
            "path": (1, string, False),
            "method": (2, string, False),
            "body": (3, bytes_, False),
            "headers": (4, message, True),
        },
        "Response": {"status": (1, int32, False), "body": (2, bytes_, False), "headers": (3, message, True)},
        "InfoRequest": {},
        "InfoResponse": {"version": (1, string, False), "models": (2, string, True), "endpoints": (3, string, True)},
    }
    [service] = DESCRIPTOR.services_by_name.values()
    methods = {
        method.name: (method.input_type.name, method.output_type.name, method.server_streaming) for method in service.methods
    }
    assert service.full_name == "assistant.AssistantService"
    assert methods == {
        "ForwardRequest": ("Request", "Response", False),
        "GetInfo": ("InfoRequest", "InfoResponse", False),
        "ForwardRequestStream": ("Request", "Response", True),
    }


PAIR = b"\n\x01k\x12\x01v"  # headers={"k": "v"}, without its tag and length


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (
            Request(path="/v1", method="GET", body=b"b", headers={"k": "v"}),
            b"\n\x03/v1" + b"\x12\x03GET" + b"\x1a\x01b" + b"\x22\x06" + PAIR,
        ),
        (Response(status=200, body=b"b", headers={"k": "v"}), b"\x08\xc8\x01" + b"\x12\x01b" + b"\x1a\x06" + PAIR),
    ],
)
def test_messages_are_the_same_bytes_as_ever(message: Request | Response, wire: bytes) -> None:
    assert message.SerializeToString() == wire
