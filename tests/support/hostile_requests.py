"""Requests as a stranger may send them: `Attacker.case(n)` is the n-th, always the same."""

import base64
import json
import random
import struct
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import quote

import hostile_images as pictures
import numpy as np
from wire import Case

from benchmarks.server import HOST, multipart

REFUSED = frozenset({400, 404, 405, 408, 411, 413, 414, 415, 417, 422, 429, 431})
HUGE = "x" * (1 << 20)
LABELS: tuple[Any, ...] = (
    "", " ", "cat", "Katze \N{CAT FACE}", "\u202egnp.exe", "a\0b", "e\u0301", "\u00e9", "\ud800",
    "../../etc/passwd", "<script>alert(1)</script>", "__metadata__", "'; DROP TABLE tasks; --",
    "\r\nSet-Cookie: a=b", "l" * 1_000, HUGE, "1", 1, 1.0, True, False, None, -0.0, 0,
    2**53 + 1, 2**64, 10**400, 1e308, float("nan"), float("inf"), [], ["cat"], {}, {"a": 1},
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 1.5, 1e-320, 1e-46, 1e38, 1e308, 1e400, float("nan"), float("-inf"), True, None,
    "5", "nan", "", [], [1], {}, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**400),
)  # fmt: skip
DATATYPES = (
    "FP32", "INT64", "BOOL", "UINT8", "BYTES", "FP16", "FP64", "fp32", "", "\0", None, 7, "F" * 999,
)  # fmt: skip
SIZES = (0, 1, 2, 5, -1, 2**31 - 1, 2**31, 2**62, 2**64, 1.5, True, "1", None, [1])
TYPES = (
    "text/plain", "application/xml", "application/json; charset=utf-16", "multipart/form-data",
    "application/x-www-form-urlencoded", "application/octet-stream", "image/png", "", "\xff/\xff",
    "application/json;" * 200, "multipart/form-data; boundary=", 'multipart/form-data; boundary="',
    "multipart/form-data; boundary=" + "b" * 5000, "multipart/mixed; boundary=x", "*/*",
    "application/json; boundary=x", "application/vnd.api+json",
)  # fmt: skip
UP = (
    "../", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%5c", "..\\", "....//", "%252e%252e%252f", "..;/",
    "%c0%ae%c0%ae/", "..%00/", "/", "./../", "%2f%2f",
)  # fmt: skip
METHODS = (
    "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND",
    "PURGE", "get", "FOO", "M-SEARCH",
)  # fmt: skip
JSON = "application/json"


class Target(NamedTuple):
    """What is attacked."""

    task: str  # id of an adapted task
    shape: tuple[int, int, int]
    ways: int
    secret: str  # name of a file beside the bundle's folder, and beside the folder of tasks


class Attacker:
    """A seeded sequence of attacks on one server."""

    def __init__(self, target: Target, seed: int) -> None:
        self._target, self._seed = target, seed
        kinds: list[tuple[float, Callable[[random.Random], Case]]] = [
            (20, self._task),
            (20, self._inference),
            (12, self._binary),
            (16, self._bytes_of_json),
            (12, self._picture),
            (8, self._form),
            (8, self._bytes_of_form),
            (10, self._chunks),
            (10, self._length),
            (6, self._head),
            (5, self._noise),
            (10, self._path),
            (8, self._method),
            (5, self._query),
            (5, self._type),
            (3, self._slow),
            (3, self._dropped),
            (8, self._foreign),
            (3, self._upgrade),
            (5, self._framing),
            (0.3, self._large),
        ]
        self._weights = [weight for weight, _ in kinds]
        self._kinds = [kind for _, kind in kinds]

    def case(self, number: int) -> Case:
        """Return the attack of that number."""
        rng = random.Random(f"{self._seed}/{number}")
        (kind,) = rng.choices(self._kinds, self._weights)
        found = kind(rng)
        return found._replace(name=f"{self._seed}/{number} {kind.__name__}: {found.name}")

    # Good requests, which the attacks start from.

    def images(self, rng: random.Random, count: int) -> Any:
        pixels = np.random.default_rng(rng.randrange(1000)).integers(
            0, 256, (count, *self._target.shape)
        )
        return pixels.tolist()

    def task(self, rng: random.Random) -> dict[str, Any]:
        return {
            "images": self.images(rng, 4),
            "labels": ["a", "a", "b", "b"],
            "steps": 1,
            "learning_rate": 0.001,
            "seed": 0,
        }

    def inference(self, rng: random.Random) -> tuple[str, dict[str, Any]]:
        pixels = [2, *self._target.shape]

        def tensor(name: str, shape: list[int], datatype: str, data: Any) -> dict[str, Any]:
            return {"name": name, "shape": shape, "datatype": datatype, "data": data}

        images = tensor("images", pixels, "FP32", self.images(rng, 2))
        if rng.random() < 0.6:
            name = rng.choice(("predict", f"task-{self._target.task}"))
            return name, {"inputs": [images]}
        return "few_shot", {
            "inputs": [
                images | {"name": "query_images"},
                images | {"name": "support_images"},
                tensor("support_labels", [2], "INT64", [0, 1]),
                tensor("batches", [1, 2], "INT64", [0, 1]),
                tensor("learning_rate", [], "FP32", [0.001]),
            ]
        }

    # The attacks.

    def _task(self, rng: random.Random) -> Case:
        body, place = self.task(rng), "/tasks"
        if rng.random() < 0.3:
            body, place = {"images": body["images"]}, self._predict
        name = rng.choice([*body, "more"])
        match name:
            case "images":
                body[name], what = self._odd_nest(rng, body[name])
            case "labels":
                labels = rng.choice((["a", "a", "b", "b"], [0, 0, 1, 1]))
                for _ in range(rng.randrange(1, 5)):
                    labels[rng.randrange(4)] = rng.choice(LABELS)
                chosen: tuple[Any, ...] = (
                    labels,
                    labels[:3],
                    labels * 2,
                    [labels],
                    "abab",
                    None,
                    {},
                    [],
                    4,
                )
                body[name] = rng.choice([labels] * 6 + [*chosen])
                what = f"labels {str(body[name])[:80]!a}"
            case "more":
                body[rng.choice(("extra", "__class__", "Steps", "timeout"))] = rng.choice(NUMBERS)
                what = "a key more"
            case _:
                body[name] = rng.choice(NUMBERS)
                what = f"{name} {str(body[name])[:50]}"
                if rng.random() < 0.2:
                    del body[name]
                    what = f"no {name}"
        return self._json(f"{place[:6]} {what}", place, body)

    def _inference(self, rng: random.Random) -> Case:
        model, body = self.inference(rng)
        tensor = rng.choice(body["inputs"])
        what = rng.choice(
            ("shape", "size", "datatype", "data", "values", "name", "outputs", "inputs", "params")
        )
        match what:
            case "shape":
                tensor["shape"] = rng.choice(
                    ([], [0], [2], [2, 1], [1] * 9, [2**31 - 1] * 4, [-1] * 4, None, "2", [[2]])
                )
            case "size" if tensor["shape"]:
                tensor["shape"][rng.randrange(len(tensor["shape"]))] = rng.choice(SIZES)
            case "datatype":
                tensor["datatype"] = rng.choice(DATATYPES)
            case "data":
                tensor["data"], _ = self._odd_nest(rng, tensor["data"])
            case "values":
                values = rng.choice(body["inputs"][2:] or body["inputs"])
                values["data"] = [
                    rng.choice((-1, -100, 5, 10**6, 2**40, 2**63, 2**64, 0.5, *NUMBERS))
                    for _ in range(max(1, int(np.prod(values["shape"], dtype=float))))
                ]
            case "name":
                tensor["name"] = rng.choice(("", "x", "images", "batches", None, 7, HUGE, "\ud800"))
            case "outputs":
                known = ("logits", "probabilities", "losses", "finite")
                names = [rng.choice((*known, "", "x", "\0", None, HUGE[:9999])) for _ in range(3)]
                chosen: tuple[Any, ...] = (
                    [{"name": name} for name in names],
                    [{"name": names[0]}] * rng.choice((2, 16, 17, 5000)),
                    names,
                    {},
                    None,
                    [{"name": "logits", "parameters": {"binary_data": True}}],
                    [{"name": "logits", "parameters": {"classification": 2**63}}],
                )
                body["outputs"] = rng.choice(chosen)
            case "inputs":
                extra = rng.choice((tensor, {"name": "x"}, {}, None, 7))
                body["inputs"] = rng.choice(
                    ([], None, body["inputs"] + [extra], [tensor] * 20, [{}] * 5000)
                )
            case _:
                size = {"binary_data_size": rng.choice(NUMBERS)}
                tensor["parameters"] = rng.choice(
                    (size, {"shared_memory_region": "x", "shared_memory_offset": 2**63}, [], None)
                )
                if rng.random() < 0.5:
                    del tensor["data"]
        body["id"] = rng.choice(("1", "", None, 7, "\0", HUGE[:300])) if rng.random() < 0.3 else "1"
        place = f"/v2/models/{model}/infer"
        return self._json(f"{model[:8]} {what}", place, body)

    def _binary(self, rng: random.Random) -> Case:
        model, body = self.inference(rng)
        after = b""
        for tensor in body["inputs"]:
            dtype = "<f4" if tensor["datatype"] == "FP32" else "<i8"
            content = np.asarray(tensor.pop("data")).astype(dtype).tobytes()
            match rng.randrange(8):
                case 0:
                    content = rng.randbytes(len(content))
                case 1:
                    content = content[: rng.randrange(len(content) + 1)]
                case 2:
                    content = pictures.mutated(rng, content)
                case 3:
                    tensor["data"] = rng.choice(NUMBERS)
            size = len(content) if rng.random() < 0.9 else rng.choice(NUMBERS)
            tensor["parameters"] = {"binary_data_size": size}
            after += content
        if rng.random() < 0.3:
            body["parameters"] = {"binary_data_output": rng.choice((True, *NUMBERS))}
        head = json.dumps(body).encode()
        length: int | str = len(head)
        if rng.random() < 0.2:
            length = rng.choice((0, 1, -1, len(head) - 1, len(head) + 1, 10**9, 10**30, "x"))
        return self._post(
            f"{model[:8]} binary",
            f"/v2/models/{model}/infer",
            head + after,
            "application/octet-stream",
            f"Inference-Header-Content-Length: {length}",
        )

    def _bytes_of_json(self, rng: random.Random) -> Case:
        if rng.random() < 0.5:
            place, body = rng.choice(("/tasks", self._predict)), self.task(rng)
        else:
            model, body = self.inference(rng)
            place = f"/v2/models/{model}/infer"
        content = json.dumps(body).encode()
        match rng.randrange(8):
            case 0:
                deep = rng.choice((1_000, 100_000))
                content = b"[" * deep + b"]" * deep
            case 1:
                content = b'{"images": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}"
            case 2:
                content = rng.choice((b"", b"null", b"7", b"[]", b'"x"', b"NaN", b"\xff\xfe", b"{"))
            case 3:
                content = content.decode().encode(rng.choice(("utf-16", "utf-32", "utf-8-sig")))
            case 4:
                content = content[:-1] + b',"images":1,"labels":2,"inputs":3}'
            case _:
                content = pictures.mutated(rng, content)
        return self._post("bytes of JSON", place, content, JSON)

    def _picture(self, rng: random.Random) -> Case:
        name, content = (pictures.refused if rng.random() < 0.6 else pictures.odd)(rng)
        refused = frozenset(REFUSED) if name in _NEVER_IMAGES else None
        files = [("cat", "a.png", pictures.png()), ("dog", "b.png", pictures.png(seed=1))]
        files[rng.randrange(2)] = ("cow", "c.png", content)
        place = "/tasks?steps=1"
        if rng.random() < 0.4:
            files, place = [("image", "c.png", content)], self._predict
        if rng.random() < 0.05:
            text = base64.b64encode(content).decode()
            return self._json(f"{name} in JSON", self._predict, {"images": [text]})
        return self._post(name, place, *multipart(files), statuses=refused)

    def _form(self, rng: random.Random) -> Case:
        good, other = pictures.png(), pictures.png(seed=1)
        files = [("cat", "a.png", good), ("dog", "b.png", other)]
        place = rng.choice(("/tasks?steps=1", "/tasks?steps=1", self._predict))
        boundary = "part-of-a-load-test"
        what = rng.choice(
            ("many", "tiny", "repeated", "label", "header", "nameless", "plain", "nested", "cut",
             "boundary", "preamble", "charset", "quotes")
        )  # fmt: skip
        body, kind = multipart(files)
        match what:
            case "many":
                body, kind = multipart([("cat", "a.png", b"")] * rng.choice((1_001, 5_000)))
            case "tiny":
                body = f"--{boundary}\r\n\r\n\r\n".encode() * rng.choice((100, 10_000))
                body += f"--{boundary}--\r\n".encode()
            case "repeated":
                body, kind = multipart(files * 20)
            case "label":
                label = str(rng.choice(LABELS)).encode("utf-8", "surrogatepass").decode("latin-1")
                body, kind = multipart([(label, "a.png", good), *files])
            case "header":
                body = body.replace(
                    b"Content-Type:", b"X: " + HUGE.encode() + b"\r\nContent-Type:", 1
                )
            case "nameless":
                body = body.replace(b'name="cat"; ', b"")
            case "plain":
                body = body.replace(b'filename="a.png"', b"x=y")
            case "nested":
                body = body.replace(
                    b"application/octet-stream", b"multipart/mixed; boundary=" + boundary.encode()
                )
            case "cut":
                body = body[: rng.randrange(len(body))]
            case "boundary":
                kind = "multipart/form-data; boundary=" + rng.choice(("x", "b" * 5000, "--"))
            case "preamble":
                body = HUGE.encode() + b"\r\n" + body + HUGE.encode()
            case "charset":
                body = body.replace(
                    b'name="cat"',
                    rng.choice((b'name="\xff\xfe"', b"name*=utf-16''%ff", b"name=\0")),
                )
            case "quotes":
                body = body.replace(b'name="cat"', b'name="' + b'\\"' * 5000 + b'"; name="x"')
        return self._post(f"form, {what}", place, body, kind)

    def _bytes_of_form(self, rng: random.Random) -> Case:
        files = [("cat", "a.png", pictures.png()), ("dog", "b.png", pictures.png(seed=1))]
        body, kind = multipart(files)
        place = rng.choice(("/tasks?steps=1", self._predict))
        return self._post("bytes of a form", place, pictures.mutated(rng, body), kind)

    def _chunks(self, rng: random.Random) -> Case:
        body = json.dumps({"images": self.images(rng, 1)}).encode()
        size = rng.choice((1, 7, 100, 4096)) if len(body) < 3000 else rng.choice((100, 4096))
        parts = [body[n : n + size] for n in range(0, len(body), size)]
        chunks = [f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts]
        end, more, what = b"0\r\n\r\n", "", rng.choice(
            ("good", "good", "size", "huge", "extension", "trailers", "both", "cut", "wrong",
             "twice", "endings", "gzip")
        )  # fmt: skip
        answered = malformed = False
        match what:
            case "good":
                answered = True
            case "size":
                chunks[0] = rng.choice((b"-1", b"x", b"0x10", b"", b" 5", b"+5", b"1;")) + b"\r\n"
                malformed = True
            case "huge":
                chunks = [rng.choice((b"F" * 16, b"7" + b"F" * 15, b"F" * 5000)) + b"\r\n" + body]
                malformed = True
            case "extension":
                chunks[0] = (
                    f"{size:x};{'e' * rng.choice((10, 100_000))}\r\n".encode() + chunks[0][4:]
                )
                malformed = True
            case "trailers":
                end = b"0\r\n" + b"X-Trailer: y\r\n" * rng.choice((1, 5_000)) + b"\r\n"
                malformed = True
            case "both":
                more = f"Content-Length: {rng.choice((0, 5, len(body), 10**9))}"
                malformed = True
            case "cut":
                chunks, end = chunks[: rng.randrange(len(chunks) + 1)], b""
                malformed = True
            case "wrong":
                chunks[0] = b"2\r\n" + chunks[0]
                malformed = True
            case "twice":
                more = "Transfer-Encoding: " + rng.choice(
                    ("chunked", "identity", "gzip", "\x0bchunked")
                )
                malformed = True
            case "endings":
                chunks = [chunk.replace(b"\r\n", b"\n") for chunk in chunks]
                malformed = True
            case "gzip":
                chunks, more = [b"5\r\n\x1f\x8b\x08\0\0\r\n"], "Content-Encoding: gzip"
                answered = True
        head = [f"POST {self._predict} HTTP/1.1", f"Host: {HOST}", f"Content-Type: {JSON}"]
        head += ["Transfer-Encoding: chunked", *([more] if more else [])]
        sent = "\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + b"".join(chunks) + end
        wanted = frozenset({200, 429}) if what == "good" else None
        return Case(
            f"chunks, {what}", (sent,), wanted, answered, ends=not answered, malformed=malformed
        )

    def _length(self, rng: random.Random) -> Case:
        body = json.dumps(self.task(rng)).encode()
        length = rng.choice(
            ("-1", "0", "1", "x", "1e3", "", " ", "+5", "0x10", "1,2", "٣", "9" * 30, "9" * 5000,
             str(2**63), str(2**64), str(len(body) - 1), str(len(body) + 1), str(10**9), "16777216",
             "16777217")
        )  # fmt: skip
        lines = [f"POST /tasks HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: {JSON}"]
        lines += [f"Content-Length: {length}"] * rng.choice((1, 1, 1, 2))
        if rng.random() < 0.2:
            lines.append(f"Content-Length: {len(body)}")
        if rng.random() < 0.1:
            lines.append("Expect: 100-continue")
        sent = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        return Case(f"length {length[:30]}", (sent,), answered=False, ends=True, malformed=True)

    def _head(self, rng: random.Random) -> Case:
        lines: tuple[bytes, ...] = (
            b"X-Header: y\r\n" * 10_000,
            b"X-%d: y\r\n" % rng.randrange(10**9) * 50,
            b"X-Long: " + HUGE.encode() + b"\r\n",
            b"X-Long: " + HUGE[:60_000].encode() + b"\r\n",
            b"X" * 70_000 + b": y\r\n",
            b"Cookie: " + b"a=b; " * 10_000 + b"\r\n",
            b"no colon\r\n",
            b": no name\r\n",
            b"X: \0\x01\x02\r\n",
            b"X: folded\r\n more\r\n",
            b"Host: a\r\nHost: b\r\n",
            b"X-Request-Id: " + rng.choice((b"\xff" * 50, b"a" * 5000, b"a b", b"")) + b"\r\n",
            b"Authorization: " + rng.choice((b"Bearer", b"Bearer \xff", b"Basic Og==")) + b"\r\n",
            b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMA\r\n",
            b"Range: bytes=" + b"0-0," * 10_000 + b"1-1\r\n",
            b"Accept-Encoding: " + b"gzip," * 5_000 + b"\r\n",
            b"If-None-Match: " + b'"x",' * 5_000 + b"\r\nIf-Modified-Since: never\r\n",
            b"Origin: http://evil.example\r\nAccess-Control-Request-Method: POST\r\n",
            b"X-Forwarded-For: " + b"1.2.3.4," * 1000 + b"\r\nX-Forwarded-Proto: ,\r\n",
        )
        place = rng.choice(("/", "/tasks", "/v2", "/metrics", "/bundle/manifest.json", "/docs"))
        first = f"GET {place} HTTP/1.1\r\nHost: {HOST}\r\n".encode()
        number = rng.randrange(len(lines))
        sent = first + lines[number] + b"\r\n"
        # Of a large head the connection is closed before it has been read.
        return Case(f"head {number}", (sent,), answered=len(sent) < 30_000, malformed=True)

    def _foreign(self, rng: random.Random) -> Case:
        """What a page of another site makes a browser send, or a name rebound to this address."""
        host, header = rng.choice(
            (
                (HOST, "Origin: http://evil.example"),
                (HOST, "Origin: null"),
                (HOST, "Origin: file://"),
                (HOST, f"Origin: http://{HOST}.evil.example"),
                (HOST, f"Origin: https://evil.example/{HOST}"),
                (HOST, f"Origin: http://{HOST}@evil.example"),
                (HOST, "Sec-Fetch-Site: cross-site"),
                (HOST, "Sec-Fetch-Site: same-site"),
                ("evil.example", "Origin: http://evil.example"),
                ("evil.example", "Sec-Fetch-Site: same-origin"),
                ("localhost.evil.example", "Accept: */*"),
            )
        )
        method, place, body = rng.choice(
            (
                ("GET", "/tasks", b""),
                ("GET", f"/tasks/{self._target.task}", b""),
                ("DELETE", f"/tasks/{self._target.task}", b""),
                ("POST", "/tasks", json.dumps(self.task(rng)).encode()),
                ("POST", self._predict, json.dumps({"images": self.images(rng, 1)}).encode()),
                ("POST", "/v2/models/predict/infer", json.dumps(self.inference(rng)[1]).encode()),
            )
        )
        kind = rng.choice((JSON, "text/plain", "application/x-www-form-urlencoded"))
        lines = [f"{method} {place} HTTP/1.1", f"Host: {host}", header, f"Content-Type: {kind}"]
        lines += [f"Content-Length: {len(body)}"]
        sent = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        return Case(f"{method} {header}", (sent,), frozenset({403}))

    def _upgrade(self, rng: random.Random) -> Case:
        """A good request that also offers another protocol, as Java's client does."""
        offer = rng.choice(
            (
                ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMA"),
                ("Connection: keep-alive, upgrade", "Upgrade: TLS/1.0"),
                ("Connection: upgrade", "Upgrade: websocket"),
            )
        )
        body = json.dumps({"images": self.images(rng, 1)}).encode()
        return self._post(offer[1], self._predict, body, JSON, *offer, statuses=frozenset({200}))

    def _framing(self, rng: random.Random) -> Case:
        """Trailers, and headers that say in two ways what a body or its sender is."""
        body = json.dumps({"images": self.images(rng, 1)}).encode()
        what = rng.choice(("trailers", "expect", "coding", "transfer", "twice"))
        header = "X: y"
        match what:
            case "trailers":
                named = (
                    "Host: evil.example",
                    "Origin: null",
                    "Content-Encoding: gzip",
                    "X: " + HUGE,
                )
                header = "Transfer-Encoding: chunked"
                trailers = "\r\n".join(rng.sample(named, 2)) + "\r\n\r\n"
                lines = [f"POST {self._predict} HTTP/1.1", f"Host: {HOST}", f"Content-Type: {JSON}"]
                head = "\r\n".join([*lines, header]) + "\r\n\r\n"
                sent = head.encode() + b"%x\r\n%s\r\n0\r\n" % (len(body), body) + trailers.encode()
                large = len(trailers) > 30_000  # may end the connection instead
                return Case(
                    what, (sent,), frozenset({200, 400}), answered=not large, malformed=large
                )
            case "expect":  # and never sends the body
                lines = ["POST /nowhere HTTP/1.1", f"Host: {HOST}", "Expect: 100-continue"]
                sent = "\r\n".join([*lines, "Content-Length: 5"]).encode() + b"\r\n\r\n"
                return Case(what, (sent,), frozenset({404}))
            case "coding":
                header = "Content-Encoding: " + rng.choice(("gzip", "br", "x", "identity, gzip"))
                statuses = frozenset({415})
            case "transfer":
                header = "Transfer-Encoding: " + rng.choice(("gzip, chunked", "x, chunked"))
                lines = [f"POST {self._predict} HTTP/1.1", f"Host: {HOST}", header]
                sent = "\r\n".join(lines).encode() + b"\r\n\r\n0\r\n\r\n"
                return Case(what, (sent,), frozenset({400}))
            case _:
                header = rng.choice(("Host: x", f"Host: {HOST}", f"Content-Type: {JSON}"))
                statuses = frozenset({400})
        return self._post(what, self._predict, body, JSON, header, statuses=statuses)

    def _noise(self, rng: random.Random) -> Case:
        made: tuple[bytes, ...] = (
            rng.randbytes(rng.choice((1, 10, 1000, 100_000))),
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + rng.randbytes(200),
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET / HTTP/1.0\r\n\r\n",
            b"GET /\r\n\r\n",
            b"GET  / HTTP/1.1\r\n\r\n",
            b"\r\n" * 10_000,
            b"\0" * 10_000,
            b"GET /"
            + b"a" * rng.choice((10_000, 100_000, 1 << 20))
            + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET http://evil.example/v2 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
            b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n" * 200,
            b"GET /\xff\xfe\0 HTTP/1.1\r\nHost: x\r\n\r\n",
            pictures.mutated(
                rng, b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
            ),
            struct.pack(">I", 2**31) * 100,
        )
        number = rng.randrange(len(made))
        return Case(f"noise {number}", (made[number],), answered=False, ends=True, malformed=True)

    def _path(self, rng: random.Random) -> Case:
        root = rng.choice(("/bundle/", "/page/", "/ort/", "/tasks/", "/v2/models/", "/"))
        end = rng.choice(
            (self._target.secret, "etc/passwd", "proc/self/environ", "manifest.json", "", ".", "\0",
             "adapt/1/model.onnx", "adapt", "adapt/", "x" * 5000, "%", "%zz", "~root", "a\nb",
             "%0d%0aSet-Cookie:%20a=b", "CON", "?", "#", "%ff")
        )  # fmt: skip
        place = root + rng.choice(UP) * rng.choice((0, 1, 1, 2, 3, 10, 200)) + end
        place = quote(place, safe="/%.\\;:?#~", encoding="latin-1")
        return self._plain(f"path {place[:80]}", "GET", place)

    def _method(self, rng: random.Random) -> Case:
        place = rng.choice(
            ("/", "/tasks", f"/tasks/{self._target.task}", self._predict, "/tasks/x/predict", "/v2",
             "/v2/health/live", "/v2/models/few_shot", "/v2/models/x", "/v2/models/predict/infer",
             "/v2/models/task-x/infer", "/metrics", "/openapi.json", "/docs", "/page/", "/bundle/",
             "/ort/", "/bundle/manifest.json", "/nowhere", "//", "/tasks/", "/v2/")
        )  # fmt: skip
        method = rng.choice(METHODS)
        if method == "DELETE" and self._target.task in place:
            method = "PUT"  # the task is needed to the end
        return self._plain(f"{method} {place[:40]}", method, place)

    def _query(self, rng: random.Random) -> Case:
        name = rng.choice(("steps", "learning_rate", "seed", "x", "steps[]", "%00", ""))
        value = quote(str(rng.choice(NUMBERS))[:500]) or rng.choice(("%ff", "%", "a&steps=2", "=="))
        files = [("cat", "a.png", pictures.png()), ("dog", "b.png", pictures.png(seed=1))]
        place = f"/tasks?steps=1&{name}={value}"
        if rng.random() < 0.1:
            place = "/tasks?" + "steps=1&" * 5_000
        return self._post(f"query {place[:60]}", place, *multipart(files))

    def _type(self, rng: random.Random) -> Case:
        kind = rng.choice(TYPES)
        good = json.dumps(self.task(rng)).encode()
        body = rng.choice((good, multipart([("cat", "a", pictures.png())])[0], b"", b"a=b&c=d"))
        place = rng.choice(("/tasks", self._predict, "/v2/models/predict/infer"))
        if rng.random() < 0.2:
            more = "Content-Encoding: gzip"
            return self._post("gzip bomb", place, pictures.gzip_bomb(), JSON, more)
        return self._post(f"type {kind[:40]!a}", place, body, kind)

    def _slow(self, rng: random.Random) -> Case:
        good = self._json("", self._predict, {"images": self.images(rng, 1)}).sent[0]
        assert isinstance(good, bytes)
        cuts = sorted(rng.randrange(1, len(good)) for _ in range(rng.choice((1, 3, 6))))
        sent: list[bytes | float] = []
        for start, end in zip([0, *cuts], [*cuts, len(good)], strict=True):
            sent += [good[start:end], rng.choice((0.0, 0.01, 0.1))]
        return Case("slow", tuple(sent), frozenset({200, 429}))

    def _dropped(self, rng: random.Random) -> Case:
        model, inference = self.inference(rng)
        good = rng.choice(
            (
                self._json("", "/tasks", self.task(rng)),
                self._json("", self._predict, {"images": self.images(rng, 5)}),
                self._json("", f"/v2/models/{model}/infer", inference),
            )
        ).sent[0]
        assert isinstance(good, bytes)
        whole = rng.random() < 0.5  # the answer finds nobody
        sent = good if whole else good[: rng.randrange(1, len(good))]
        return Case("dropped", (sent, 0.01), answered=False, closes=True)

    def _large(self, rng: random.Random) -> Case:
        limit = 2**24
        what = rng.choice(("lists", "numbers", "text", "endless", "pictures", "over"))
        place = rng.choice(("/tasks", self._predict))
        match what:
            case "lists":
                body = b'{"images": [' + b"[]," * (limit // 3 - 20) + b"[]]}"
            case "numbers":
                body = b'{"images": [' + b"1.5," * (limit // 4 - 20) + b"1]}"
            case "text":
                body = b'{"labels": "' + b"\\u0041" * (limit // 6 - 20) + b'"}'
            case "pictures":
                files = [("cat", "a.png", pictures.large_png()), ("dog", "b.png", pictures.png())]
                return self._post("large pictures", "/tasks?steps=1", *multipart(files * 5))
            case "over":
                return self._post("too large", place, b" " * (limit + 1), JSON)
            case _:
                chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
                head = f"POST {place} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: {JSON}\r\n"
                head += "Transfer-Encoding: chunked\r\n\r\n"
                return Case("endless", (head.encode(), *[chunk] * 400), answered=False)
        return self._post(f"large, {what}", place, body, JSON)

    def _odd_nest(self, rng: random.Random, nest: Any) -> tuple[Any, str]:
        """A nest of lists that is not quite as it was, and what became of it."""
        inner = nest
        while isinstance(inner, list) and inner and isinstance(inner[0], list):
            inner = inner[rng.randrange(len(inner))]
        what = rng.choice(("value", "values", "ragged", "deeper", "flat", "empty", "no list"))
        match what:
            case "value" if inner:
                inner[rng.randrange(len(inner))] = rng.choice((*NUMBERS, 256, -0.5, HUGE[:1000]))
            case "values" if inner:
                inner[:] = [rng.choice(NUMBERS)] * len(inner)
            case "ragged":
                inner.append(rng.choice((0, [], None)))
            case "deeper":
                for _ in range(rng.choice((1, 2, 40, 70, 500))):
                    nest = [nest]
            case "flat":
                nest = np.asarray(nest).ravel().tolist() if rng.random() < 0.5 else [0] * 10_000
            case "empty":
                nest = rng.choice(([], [[]], [[[[]]]], [[] for _ in range(10_000)]))
            case _:
                nest = rng.choice((None, "", "iVBORw0KGgo=", {}, 7, True))
        return nest, what

    # How requests are written.

    @property
    def _predict(self) -> str:
        return f"/tasks/{self._target.task}/predict"

    def _json(self, name: str, place: str, value: Any, *more: str) -> Case:
        return self._post(name, place, json.dumps(value).encode(), JSON, *more)

    def _post(
        self,
        name: str,
        place: str,
        body: bytes,
        kind: str,
        *more: str,
        statuses: frozenset[int] | None = None,
    ) -> Case:
        lines = [f"POST {place} HTTP/1.1", f"Host: {HOST}", f"Content-Type: {kind}"]
        lines += [f"Content-Length: {len(body)}", *more]
        head = "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"
        # A large body may be refused and the connection closed before it has been read.
        small = len(body) < 100_000
        return Case(name, (head + body,), statuses, answered=small)

    def _plain(self, name: str, method: str, place: str) -> Case:
        sent = f"{method} {place} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode("latin-1", "replace")
        return Case(name, (sent,), answered=False, malformed=True, bodiless=method == "HEAD")


_NEVER_IMAGES = {
    "pixel bomb", "50,000 x 50,000 with no data", "2 billion wide", "no width", "cut",
    "wrong checksum", "GIF of 50 frames", "WebP of 50 frames", "TIFF", "BMP", "zip bomb", "SVG",
    "EPS", "text", "empty", "16 bits",
}  # fmt: skip
