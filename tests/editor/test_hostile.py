"""Requests that mean harm: a clear refusal, and the server goes on serving."""
import base64
import concurrent.futures
import io
import json
import os
import socket
import struct
import subprocess
import urllib.parse
import zlib

import pytest
from PIL import Image
from support import HOST_DEMO, Server, png, quick, small_prompt


@pytest.fixture(autouse=True)
def goes_on_serving(server):
    yield
    assert server.finished(server.queue_prompt(quick()))["status"]["completed"]


def refused(reply, *statuses):
    """The answer is a refusal in JSON that says something."""
    assert reply.status in statuses, (reply.status, reply.body[:300])
    assert len(reply.json["error"]["message"]) > 10
    return True


def test_paths_do_not_leave_their_folders(server, tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    server.finished(server.queue_prompt(quick()))
    os.symlink(tmp_path / "secret.png", server.data / "output/link.png")
    os.symlink(tmp_path, server.data / "output/folder")
    os.symlink(tmp_path, server.data / "user/folder")
    names = ["../secret.png", "..%2Fsecret.png", "%2e%2e/secret.png", str(tmp_path / "secret.png"), "link.png",
             "folder/secret.png", "a\\..\\..\\secret.png", "x\0.png", "quick/../../secret.png", "C:/secret.png", ""]
    for name in names:
        for query in ({"filename": name}, {"filename": os.path.basename(name), "subfolder": os.path.dirname(name) or ".."}):
            refused(server.get("/view?" + urllib.parse.urlencode(query)), 400, 403, 404)
    for name in ["../secret.png", "folder/secret.png", "/etc/passwd", "..\\secret.png", "a/../../secret.png", "x\0"]:
        quoted = urllib.parse.quote(name, safe="")
        refused(server.get(f"/api/userdata/{quoted}"), 400, 403, 404)
        refused(server.request("POST", f"/api/userdata/{quoted}", b"{}"), 400, 403)
        refused(server.request("DELETE", f"/api/userdata/{quoted}"), 400, 403, 404)
        refused(server.request("POST", f"/api/userdata/a.json/move/{quoted}"), 400, 403, 404)
    for fields in [{"subfolder": ".."}, {"subfolder": "/tmp"}, {"subfolder": "a\\.."}, {"type": "etc"}]:
        refused(server.upload("x.png", png(), **fields), 400)
    refused(server.upload("../x.png", png()), 400)
    for name in ["../../secret.png", str(tmp_path / "secret.png"), "link.png [output]"]:
        prompt = quick()
        prompt["1"]["inputs"]["image"] = name
        refused(server.post("/prompt", {"prompt": prompt}), 400)
    pictures, concepts = quick(), small_prompt()
    [saver] = [node for node in concepts.values() if node["class_type"] == "SaveConcepts"]
    for prompt, node in [(pictures, pictures["2"]), (concepts, saver)]:
        for prefix in ("folder/mine", "folder/%year%/mine", "folder"):
            node["inputs"]["filename_prefix"] = prefix
            reply = server.post("/prompt", {"prompt": prompt})
            [problem] = [error for entry in reply.json["node_errors"].values() for error in entry["errors"]]
            assert problem["extra_info"]["input_name"] == "filename_prefix" and "by a link" in problem["message"], problem
    assert (tmp_path / "secret.png").read_bytes() == png()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "data.log", "secret.png"]


def test_static_files_stay_in_the_editor_s_folder(tmp_path):
    (tmp_path / "editor").mkdir()
    (tmp_path / "editor/index.html").write_text("<html>")
    (tmp_path / "secret").write_text("secret")
    with Server(tmp_path / "other", "--front-end-root", str(tmp_path / "editor")) as server:
        assert server.get("/").body == b"<html>"
        for path in ["/../secret", "/%2e%2e/secret", "/..%2fsecret", "//etc/passwd", "/a/../../secret"]:
            assert b"secret" != raw(server, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[-6:]


def raw(server, text):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(text.encode())
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def test_other_sites_are_refused(server):
    for origin in ["http://evil.example", "null", "http://127.0.0.1:1", "http://localhost.evil.example"]:
        refused(server.post("/prompt", {"prompt": quick()}, headers={"origin": origin}), 403)
        refused(server.get("/ws", headers={"origin": origin, "upgrade": "websocket", "connection": "upgrade",
                                           "sec-websocket-version": "13", "sec-websocket-key": "x" * 22 + "=="}), 403)
    for host in ["evil.example", "127.0.0.1.evil.example:80", ""]:
        assert b" 40" in raw(server, f"GET /api/queue HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")[:15]
    for kind in ["text/plain", "application/x-www-form-urlencoded", ""]:
        body = json.dumps({"prompt": quick()}).encode()
        for path in ("/prompt", "/interrupt"):
            browser = {"content-type": kind, "user-agent": "Mozilla/5.0"}
            refused(server.request("POST", path, body, browser), 415)
    assert server.get("/history").json == {}


def test_only_pictures_are_taken_and_shown_and_the_rest_is_saved(server):
    for name, content in [("x.html", b"<script>alert(1)</script>"), ("x.png", b"<html>"),
                          ("x.svg", b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")]:
        refused(server.upload(name, content), 415)
        (server.data / "output" / name).write_bytes(content)
        saved = server.get(f"/view?filename={name}")
        assert saved.headers["content-type"] == "application/octet-stream"
        assert saved.headers["x-content-type-options"] == "nosniff"
        assert saved.headers["content-disposition"].startswith("attachment")
        assert "sandbox" in saved.headers["content-security-policy"]
    assert server.upload("evil.html", png()).status == 200, "a picture of a bad name is still only a picture"
    shown = server.get("/view?filename=evil.html&type=input")
    assert shown.headers["content-type"] == "image/png"
    assert shown.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in shown.headers["content-security-policy"]
    server.request("POST", "/api/userdata/x.html", b"<script>alert(1)</script>")
    page = server.get("/api/userdata/x.html")
    assert page.headers["content-type"] == "application/octet-stream"
    assert "attachment" in page.headers["content-disposition"]


def test_a_picture_that_unfolds_is_refused(server):
    """A few kilobytes that claim 50,000 x 50,000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10_000_000))) + chunk(b"IEND", b"")
    before = server.peak_bytes()
    refused(server.upload("bomb.png", bomb), 400)
    (server.data / "input/bomb.png").write_bytes(bomb)
    prompt = quick()
    prompt["1"]["inputs"]["image"] = "bomb.png"
    reply = server.post("/prompt", {"prompt": prompt})
    if reply.status == 200:
        entry = server.finished(reply.json["prompt_id"])
        assert "largest size" in json.dumps(entry["status"]["messages"])
    assert server.peak_bytes() - before < 64 << 20


def test_huge_bodies_are_refused_early(server):
    before = server.peak_bytes()
    for path, kind in [("/prompt", "application/json"), ("/upload/image", "multipart/form-data; boundary=x"),
                       ("/api/userdata/x.json", "application/json")]:
        for length in (True, False):
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
            head += f"Content-Length: {1 << 30}\r\n\r\n" if length else "Transfer-Encoding: chunked\r\n\r\n"
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
                connection.sendall(head.encode())
                block = b"x" * (1 << 20)
                piece = block if length else b"100000\r\n" + block + b"\r\n"
                sent = 0
                try:
                    for sent in range(1024):
                        connection.sendall(piece)
                except OSError:
                    pass
                try:
                    answer = connection.recv(65536)
                except OSError:
                    answer = b""
            assert sent < 512, f"{path} took {sent} MiB"
            assert answer == b"" or b" 413 " in answer[:20] or b" 400 " in answer[:20], answer[:200]
    assert server.peak_bytes() - before < 256 << 20


def test_huge_and_deep_graphs_are_refused(server):
    node = {"class_type": "PreviewImage", "inputs": {"images": ["0", 0]}}
    reply = server.post("/prompt", {"prompt": {str(i): node for i in range(100_000)}})
    assert refused(reply, 400, 413) and "node" in reply.json["error"]["message"]
    deep = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    refused(server.request("POST", "/prompt", deep, {"content-type": "application/json"}), 400)
    chain = {"0": {"class_type": "LoadImage", "inputs": {"image": "demo:man-and-cat.png"}}}
    for i in range(1, 4000):
        chain[str(i)] = {"class_type": "ImageBatch", "inputs": {"image1": [str(i - 1), 0]}}
    chain["x"] = {"class_type": "PreviewImage", "inputs": {"images": ["4000", 0]}}
    refused(server.post("/prompt", {"prompt": chain}), 400)
    circle = {"1": {"class_type": "ImageBatch", "inputs": {"image1": ["2", 0]}},
              "2": {"class_type": "ImageBatch", "inputs": {"image1": ["1", 0]}},
              "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}
    reply = server.post("/prompt", {"prompt": circle})
    assert refused(reply, 400) and "cycle" in reply.body.decode()


def test_what_is_nested_too_deep_to_be_kept_is_refused(server):
    nested = lambda n: json.loads("[" * n + "]" * n)
    refused(server.post("/settings", {"x": nested(120)}), 400)
    refused(server.post("/api/settings/x", nested(120)), 400)
    reply = server.post("/prompt", {"prompt": quick(), "extra_data": {"x": nested(100)}})
    assert refused(reply, 400) and "nested more than" in reply.json["error"]["message"]
    kept = server.post("/prompt", {"prompt": quick(), "extra_data": {"x": nested(90), "extra_pnginfo": {"workflow": nested(90)}}})
    assert server.finished(kept.json["prompt_id"])["status"]["completed"]
    assert server.post("/api/settings/x", nested(90)).status == 200
    assert server.get("/api/settings/x").json == nested(90)


def test_a_server_starts_with_the_deepest_setting_that_it_took(tmp_path):
    deepest = lambda n: json.loads("[" * n + "]" * n)
    with Server(tmp_path / "deep") as server:
        n = max(n for n in range(80, 130) if server.post("/api/settings/x", deepest(n)).status == 200)
    with Server(tmp_path / "deep") as again:
        assert again.get("/api/settings/x").json == deepest(n)


def test_the_settings_are_not_written_as_a_file(server):
    assert server.post("/api/settings/x", 1).status == 200
    for name in ("settings.json", "Settings.json", "settings.json%2Fx"):
        refused(server.request("POST", f"/api/userdata/{name}", b"[]"), 403)
    refused(server.request("DELETE", "/api/userdata/settings.json"), 403)
    assert server.request("POST", "/api/userdata/a.json", b"[]").status == 200
    refused(server.request("POST", "/api/userdata/a.json/move/settings.json?overwrite=true", b""), 403)
    refused(server.request("POST", "/api/userdata/settings.json/move/b.json", b""), 403)
    refused(server.request("POST", "/api/userdata/.conceptloom-1.tmp", b"[]"), 400, 403)
    assert server.get("/api/settings/x").json == 1


def test_keys_of_others_are_not_kept(server):
    keys = {"auth_token_comfy_org": "secret-1", "api_key_comfy_org": "secret-2", "other": "kept"}
    prompt_id = server.post("/prompt", {"prompt": quick(), "extra_data": keys}).json["prompt_id"]
    server.finished(prompt_id)
    shown = server.get("/history").body + server.get(f"/api/jobs/{prompt_id}").body
    shown += (server.data / "queue.jsonl").read_bytes()
    assert b"kept" in shown and b"secret" not in shown


def test_a_body_that_ends_early_is_called_so(server):
    head = "POST /api/settings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = raw(server, head + "zz\r\n")
    assert b" 400 " in answer.split(b"\r\n")[0] and b"larger" not in answer


def test_a_thousand_half_open_connections(server):
    silent = []
    for _ in range(1000):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        connection.sendall(b"GET /api/queue HTTP/1.1\r\nHost: loc")
        silent.append(connection)
    assert server.get("/api/queue", timeout=10).status == 200
    assert server.finished(server.queue_prompt(quick()))["status"]["completed"]
    for connection in silent:
        connection.close()


def test_who_has_said_everything_is_still_answered(server):
    assert server.upload("a.png", png(), overwrite="true").status == 200
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        view = b"GET /view?filename=a.png&type=input HTTP/1.1\r\nhost: localhost\r\n\r\n"
        connection.sendall(view * 5)
        connection.shutdown(socket.SHUT_WR)
        answers = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answers.count(b"HTTP/1.1 200 OK") == answers.count(png()) == 5


def test_other_machines_need_a_token(tmp_path, server):
    def start(*arguments):
        return subprocess.run([HOST_DEMO, "serve", "--port", "0", "--data", str(tmp_path / "d"), *arguments],
                              capture_output=True, text=True, timeout=60)
    done = start("--listen", "0.0.0.0")
    assert done.returncode == 1 and "--token" in done.stderr
    done = start("--listen", "0.0.0.0", "--token", "short")
    assert done.returncode == 1 and "16" in done.stderr
    token = "a-token-of-enough-length"
    with Server(tmp_path / "e", "--listen", "0.0.0.0", "--token", token) as other:
        other.base = f"http://127.0.0.1:{other.port}"
        refused(other.get("/api/queue"), 401)
        refused(other.post("/prompt", {"prompt": quick()}, headers={"authorization": "Bearer wrong"}), 401)
        assert other.get("/api/queue", headers={"authorization": f"Bearer {token}"}).status == 200
        # What a browser does: it asks for a page, for the password, and keeps a cookie.
        page = {"accept": "text/html,*/*"}
        asked = other.get("/", headers=page)
        assert refused(asked, 401) and asked.headers["www-authenticate"].startswith("Basic ")
        password = base64.b64encode(f"anybody:{token}".encode()).decode()
        shown = other.get("/", headers=page | {"authorization": f"Basic {password}"})
        cookie = shown.headers["set-cookie"]
        assert shown.status == 200 and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        assert other.get("/api/queue", headers={"cookie": cookie.split(";")[0]}).status == 200
        # A page is not left with the token in its address, and nothing that is written down has it.
        answer = raw(other, f"GET //evil.example/?a=1&token={token} HTTP/1.1\r\nHost: localhost\r\nAccept: text/html\r\n"
                            "Connection: close\r\n\r\n").decode()
        assert answer.startswith("HTTP/1.1 303 ") and "location: /evil.example/?a=1\r\n" in answer
        answer = other.get(f"/api/queue?token={token}")
        assert answer.status == 200 and "set-cookie" not in answer.headers
        said = other.url + other.get("/internal/logs", headers={"authorization": f"Bearer {token}"}).body.decode()
        assert token not in said and token not in (tmp_path / "e.log").read_text()


def test_nothing_is_fetched_or_installed(server):
    """Routes by which ComfyUI's manager and others had code brought in."""
    before = sorted(server.data.rglob("*"))
    for path in ("/customnode/install", "/customnode/install/git_url", "/customnode/install/pip", "/externalmodel/install",
                 "/model/install", "/manager/queue/install", "/snapshot/restore", "/api/v2/manager/queue/install"):
        body = {"url": "https://example.com/x.git", "files": ["https://example.com/../x.py"], "filename": "../x.py"}
        for version in (path, "/api" + path):
            refused(server.post(version, body), 404, 405)
    assert sorted(server.data.rglob("*")) == before


def test_two_servers_do_not_share_a_folder(server):
    done = subprocess.run([HOST_DEMO, "serve", "--port", "0", "--data", str(server.data)], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 1 and "another server" in done.stderr


def test_pictures_of_one_name_at_one_time_are_all_kept(server):
    """As an editor sends several that were pasted: each is called image.png."""
    def picture(shade):
        content = io.BytesIO()
        Image.new("RGB", (2, 2), (shade, 0, 0)).save(content, "PNG")
        return content.getvalue()

    pictures = [picture(shade) for shade in range(64)]
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        replies = list(threads.map(lambda content: server.upload("pasted.png", content), pictures))
    names = [reply.json["name"] for reply in replies]
    assert len(set(names)) == len(pictures), sorted(names)
    for name, content in zip(names, pictures):
        assert server.view({"filename": name, "type": "input"}) == content, name
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        saved = list(threads.map(lambda n: server.request("POST", "/userdata/one.json?overwrite=false", b"%d" % n).status, range(16)))
    assert sorted(saved) == [200] + 15 * [409]
