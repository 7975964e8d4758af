#!/usr/bin/env python3
"""Holds the structure of the sources: who includes whom, how long files are, what is left unsaid.

cmake/HeaderChecks.cmake adds that every header of kernels/ compiles alone. Run by ctest as
`structure`; by hand: tests/unit/structure_test.py -v
"""
import pathlib
import re
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CODE = (".h", ".cc", ".cu", ".cuh")

# What the files of a folder may include of ours, by the first folder of the included path.
# "adaattn" is the generated code of proto/.
FOLDERS = {
    "kernels": {"kernels"},
    "server": {"server", "kernels", "adaattn"},
    "client": {"client", "kernels", "adaattn"},
    "loadtest": {"loadtest", "client", "kernels", "adaattn"},
}
OURS = {"kernels", "server", "client", "loadtest", "tests", "adaattn"}

# The server from top to bottom: a component includes its own layer and the layers below. A new file
# of server/ is entered here, where its reader would look for it.
SERVER_LAYERS = {
    "main": ["main"],
    "serve": ["serve"],
    "server": ["server"],
    "services": ["attend_call", "attend_reactors", "attend_stream", "attention_service", "control_calls",
                 "export_reactor", "import_reactor", "kv_reactors"],
    "messages": ["attend_reply", "attend_validation", "call", "call_trace", "policy_options",
                 "profile_validation", "validation", "wire"],
    "outside": ["admin_page", "metrics", "option_checks", "option_table", "options",
                "preflight"],
    "engine": ["engine"],
    "work": ["auditor", "batch_reply", "batch_runner", "decision_summary", "engine_observer",
             "payload_reader", "profile_store", "sealer", "session_control", "step"],
    "batcher": ["batcher"],
    "cache": ["attention_task", "kv_cache", "session_table"],
    "session": ["session"],
    "pages": ["attend_options", "model_profile", "page_allocator", "session_id"],
    "leaves": ["admission", "clock", "head_sums", "histogram", "http_server", "live_page", "log",
              "metric_registry", "metric_table", "openmetrics", "policy_file", "process_stats", "trace"],
}
# Layers that know the generated messages and gRPC; everything else is free of both.
MESSAGE_LAYERS = {"server", "services", "messages"}

MAX_LINES = {"kernels": 500}
DEFAULT_MAX_LINES = 400
MARKS = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def ours():
    """Paths of all files of the repository; outputs, generated code and data left out."""
    skipped = {"build", "__pycache__", "data"}
    for top in sorted(ROOT.iterdir()):
        if top.name in skipped or top.name in (".git", ".venv", ".cache"):
            continue
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix == ".png" or "_pb2" in path.name or skipped & set(path.parts[len(ROOT.parts):]):
                continue
            if path.is_file():
                yield str(path.relative_to(ROOT))


def sources():
    """Path -> text of every source of ours."""
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in ours()
            if path.endswith(CODE) and path.split("/")[0] in OURS}


def component(path):
    """server/batcher.cc -> batcher; server/transport/local.h -> transport."""
    parts = path.split("/")
    return parts[1].split(".")[0] if len(parts) == 2 else parts[1]


def layer(path):
    name = component(path)
    for title, names in SERVER_LAYERS.items():
        if name in names:
            return title
    return None


def stands_above(path, other):
    order = list(SERVER_LAYERS)
    return order.index(layer(path)) < order.index(layer(other))


def included(text):
    return INCLUDE.findall(text)


def folder_violations(files):
    found = []
    for path, text in files.items():
        allowed = FOLDERS.get(path.split("/")[0])
        for name in included(text):
            folder = name.split("/")[0]
            if allowed is not None and folder in OURS and folder not in allowed:
                found.append(f"{path} includes {name}")
    return found


def layer_violations(files):
    found = []
    for path, text in files.items():
        if not path.startswith("server/"):
            continue
        if layer(path) is None:
            found.append(f"{path} stands in no layer of SERVER_LAYERS")
            continue
        for name in included(text):
            if name.startswith("server/") and layer(name) and stands_above(name, path):
                found.append(f"{path} includes {name}, which stands above it")
    return found


def is_message_header(name):
    return name.endswith(".pb.h") or name.startswith("grpcpp/")


def message_violations(files):
    found = []
    for path, text in files.items():
        folder = path.split("/")[0]
        if folder in ("tests", "client", "loadtest"):
            continue
        if folder == "server" and layer(path) in MESSAGE_LAYERS:
            continue
        found += [f"{path} includes {name}" for name in included(text) if is_message_header(name)]
    return found


def header_circles(files):
    """Headers of ours that include each other in a circle."""
    edges = {path: [name for name in included(text) if name in files]
             for path, text in files.items() if path.endswith((".h", ".cuh"))}
    found, state = [], {}

    def visit(trail):
        state[trail[-1]] = "open"
        for target in edges.get(trail[-1], []):
            if state.get(target) == "open":
                found.append(" -> ".join([*trail[trail.index(target):], target]))
            elif target not in state:
                visit([*trail, target])
        state[trail[-1]] = "done"

    for header in edges:
        if header not in state:
            visit([header])
    return found


def launch_violations(files):
    found = []
    for path, text in files.items():
        if not path.startswith(("kernels/cuda/", "loadtest/", "tests/")) and "<<<" in text:
            found.append(path)
    return found


def length_violations(files):
    found = []
    for path, text in files.items():
        most = MAX_LINES.get(path.split("/")[0], DEFAULT_MAX_LINES)
        lines = text.count("\n")
        if lines > most:
            found.append(f"{path}: {lines} lines, at most {most}")
    return found


class StructureTest(unittest.TestCase):
    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.files = sources()

    def test_folders_include_only_what_they_may(self):
        self.assertEqual(folder_violations(self.files), [])

    def test_server_includes_downwards(self):
        self.assertEqual(layer_violations(self.files), [])

    def test_messages_stay_in_services_and_client(self):
        self.assertEqual(message_violations(self.files), [])

    def test_headers_include_in_no_circle(self):
        self.assertEqual(header_circles(self.files), [])

    def test_the_product_launches_kernels_only_under_kernels_cuda(self):
        self.assertEqual(launch_violations(self.files), [])

    def test_files_are_short(self):
        extra = {path: (ROOT / path).read_text(encoding="utf-8") for path in ours()
                 if path.endswith((".py", ".sh", ".cmake")) or path.startswith("scripts/")}
        self.assertEqual(length_violations({**self.files, **extra}), [])

    def test_nothing_is_marked_as_unfinished(self):
        found = []
        for path in ours():
            text = (ROOT / path).read_text(encoding="utf-8", errors="replace")
            found += [f"{path}: {mark}" for mark in MARKS.findall(text)]
        self.assertEqual(found, [])


class CheckerTest(unittest.TestCase):
    """The checks above find what they look for."""

    def test_folder(self):
        bad = {"kernels/a.h": '#include "server/clock.h"\n', "client/b.h": '#include "server/wire.h"\n'}
        self.assertEqual(len(folder_violations(bad)), 2)
        good = {"server/a.h": '#include "kernels/shape.h"\n#include <vector>\n#include "absl/a.h"\n'}
        self.assertEqual(folder_violations(good), [])

    def test_layers(self):
        self.assertEqual(len(layer_violations({"server/batcher.cc": '#include "server/engine.h"\n'})), 1)
        self.assertEqual(layer_violations({"server/engine.cc": '#include "server/batcher.h"\n'}), [])
        self.assertEqual(len(layer_violations({"server/unheard_of.cc": ""})), 1)

    def test_messages(self):
        text = '#include "adaattn/v1/attention.pb.h"\n'
        self.assertEqual(len(message_violations({"server/engine.h": text, "kernels/a.h": text})), 2)
        self.assertEqual(message_violations({"server/wire.h": text, "client/a.cc": text}), [])
        self.assertEqual(len(message_violations({"kernels/a.h": "#include <grpcpp/grpcpp.h>\n"})), 1)

    def test_circles(self):
        circle = {"server/a.h": '#include "server/b.h"\n', "server/b.h": '#include "server/a.h"\n'}
        self.assertEqual(header_circles(circle), ["server/a.h -> server/b.h -> server/a.h"])
        implementation = {"server/a.h": '#include "server/b.h"\n', "server/b.h": "",
                          "server/b.cc": '#include "server/a.h"\n'}
        self.assertEqual(header_circles(implementation), [])

    def test_length(self):
        self.assertEqual(len(length_violations({"server/a.cc": "\n" * 401, "kernels/b.h": "\n" * 500})), 1)

    def test_launch(self):
        self.assertEqual(launch_violations({"kernels/cuda/a.cu": "f<<<1, 2>>>()", "tests/a.cu": "<<<",
                                            "server/a.cc": "<<<"}),
                         ["server/a.cc"])


if __name__ == "__main__":
    unittest.main()
