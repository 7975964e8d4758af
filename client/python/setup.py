"""Generates adaattn/v1 from the contract before the package is built or installed for editing."""
import pathlib

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = pathlib.Path(__file__).resolve().parent
PROTO_ROOT = HERE.parent.parent / "proto"


class BuildWithProtos(build_py):
    def run(self):
        from grpc_tools import protoc

        protos = [str(path) for path in sorted(PROTO_ROOT.glob("adaattn/v1/*.proto"))]
        if not protos:
            raise RuntimeError(f"no .proto under {PROTO_ROOT}: install from a checkout of the repository")
        arguments = ["protoc", f"-I{PROTO_ROOT}", f"--python_out={HERE}", f"--grpc_python_out={HERE}"]
        if protoc.main(arguments + protos) != 0:
            raise RuntimeError("protoc failed")
        super().run()


setup(cmdclass={"build_py": BuildWithProtos})
