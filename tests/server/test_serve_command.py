"""`icar serve` as a separate process: start, invalid settings and shutdown."""

import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest

import icar_jax
from icar_jax import cli
from tests.support import serverkit
from tests.support.programs import environment


@pytest.mark.parametrize("flags, match", [
    (["--host", "0.0.0.0"], "--host 0.0.0.0 is reachable from other machines"),
    (["--token", "short"], "at least 16 printable"),
    (["--token-file", "/no/such/file"], "No such file"),
    (["--allowed-host", "a.example"], "--allowed-host"),
    (["--port", "70000"], "0 and 65535"),
    ([], "there is no store at"),
])  # fmt: skip
def test_what_is_refused_before_anything_is_opened(flags, match, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--store", str(tmp_path / "none"), *flags])
    said = capsys.readouterr()
    assert end.value.code == 2 and re.search(match, said.err) and "Traceback" not in said.err


def own_address() -> str | None:
    """The network address of this machine, or None; sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address = probe.getsockname()[0]
    return None if address.startswith("127.") else address


@pytest.mark.check
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_it_starts_answers_and_ends(number, clip_folder, complexity_folder, tmp_path):
    bundle = serverkit.make_bundle(clip_folder, complexity_folder, tmp_path / "bundle")
    serverkit.fill(tmp_path / "store", icar_jax.load(bundle, batch_size=8), serverkit.draw(tmp_path / "pictures", 6))
    (tmp_path / "token").write_text("a-token-of-some-length\n")
    command = [sys.executable, "-m", "icar_jax.cli", "serve", "--store", str(tmp_path / "store"), "--port", "0"]
    command += ["--token-file", str(tmp_path / "token")]
    process = subprocess.Popen(
        command, env=environment(tmp_path / "cache"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        lines = iter(process.stdout.readline, "")
        address = next((found[1] for line in lines if (found := re.search(r"Serving (http://127\.0\.0\.1:\d+/)", line))), None)
        assert address, process.communicate()[1][-3000:]
        assert httpx.get(f"{address}readyz", timeout=60).status_code == 200
        assert httpx.get(f"{address}api/search?q=a", timeout=60).status_code == 401
        headers = {"Authorization": "Bearer a-token-of-some-length"}
        assert len(httpx.get(f"{address}api/search?q=a", headers=headers, timeout=60).json()["hits"]) == 6
        port = int(address.rstrip("/").rpartition(":")[2])
        if (own := own_address()) is not None:
            with socket.socket() as other:  # not reachable from other machines
                other.settimeout(2)
                with pytest.raises(OSError):
                    other.connect((own, port))
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out.endswith("stopped\n") and "Traceback" not in err, err[-3000:]
    finally:
        process.kill()
        process.communicate()
