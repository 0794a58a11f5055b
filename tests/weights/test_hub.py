"""What is fetched from a hub: a small one of our own, over HTTP."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import tiny

ROOT = Path(__file__).parents[2]
OPEN = "import sys; from sftjax.weights import hf; files = hf.open_model(sys.argv[1]); hf.stored_dtypes(files)"
COMMIT = "0" * 39 + "1"


@pytest.fixture
def hub(tmp_path):
    """A server with repositories `owner/<folder>`; `.fetched` lists the files that were read from it."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            parts = self.path.partition("?")[0].strip("/").split("/")
            if len(parts) < 4 or not (tmp_path / parts[3 if parts[0] == "api" else 1]).is_dir():
                self.send_error(404)
                return
            if parts[:2] == ["api", "models"]:
                folder = tmp_path / parts[3]
                names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
                answer = {"id": f"owner/{parts[3]}", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                if "tree" in parts:
                    sizes = [(folder / name).stat().st_size for name in names]
                    entries = zip(names, sizes, strict=True)
                    answer = [{"type": "file", "path": name, "size": size, "oid": COMMIT} for name, size in entries]
                data = json.dumps(answer).encode()
                headers = {"Content-Type": "application/json"}
            else:  # owner/name/resolve/revision/file
                name = "/".join(parts[4:])
                data = (tmp_path / parts[1] / name).read_bytes()
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
                if body:
                    server.fetched.append(name)
            self.send_response(200)
            for key, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.fetched = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def opened(hub, name, cache, *, offline="0"):
    url = f"http://127.0.0.1:{hub.server_port}"
    env = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", OPEN, f"owner/{name}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("files", [1, 2])
def test_weights_are_fetched_once_and_copies_in_other_formats_never(hub, tmp_path, files):
    raw = tiny.config_dict("llama")
    folder = tiny.write_model(tmp_path / "model", raw, tiny.random_tensors(raw), files=files)
    weights = sorted(path.name for path in folder.glob("*.safetensors*"))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("{{ messages }}")
    for copy in ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "onnx/config.json"):
        (folder / copy).parent.mkdir(exist_ok=True)
        (folder / copy).write_bytes(b"the same again")
    opened(hub, "model", tmp_path / "cache")
    small = ["additional_chat_templates/rag.jinja", "config.json", "tokenizer.json"]
    assert sorted(hub.fetched) == sorted([*small, *weights])
    hub.fetched.clear()
    opened(hub, "model", tmp_path / "cache", offline="1")
    assert hub.fetched == []
