"""API keys: only hashes on disk, only the owner reads, revoked means out."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from broker.accounts.keys import KeyFile, KeyRing
from broker.cli import keys as keys_command
from edge_runtime.contract.errors import ConfigError, Unauthorized


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o610])
def test_a_file_that_others_can_touch_is_refused(file: KeyFile, mode: int):
    file.add("acme")
    file.path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600"):
        file.read()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"format":"nearfar.keys","schema_version":2,"keys":[]}',
        b'{"format":"nearfar.keys","schema_version":1,"keys":[],"admin":true}',
        b'{"format":"nearfar.keys","schema_version":1,"keys":[{"id":"short"}]}',
    ],
)
def test_a_file_that_makes_no_sense_is_refused(file: KeyFile, text: bytes):
    file.path.write_bytes(text)
    file.path.chmod(0o600)
    with pytest.raises(ConfigError, match="no key file"):
        file.read()


def test_a_missing_file_says_how_to_make_one(file: KeyFile):
    with pytest.raises(ConfigError, match="nearfar keys add"):
        file.read()


def test_an_endless_file_is_not_read_to_its_end(file: KeyFile):
    file.path.write_bytes(b" " * (2**20 + 1))
    file.path.chmod(0o600)
    with pytest.raises(ConfigError, match="more than 1048576 bytes"):
        file.read()


def test_a_folder_or_pipe_is_no_key_file(tmp_path: Path):
    with pytest.raises(ConfigError):
        KeyFile(tmp_path).read()


@pytest.mark.parametrize("tenant", ["", "Acme", "a b", "../x", "a" * 65, "acme\n"])
def test_a_tenant_that_is_no_plain_name_is_refused(file: KeyFile, tenant: str):
    with pytest.raises(ConfigError, match="tenant"):
        file.add(tenant)
    assert not file.path.exists()


def test_revoking_an_unknown_key_changes_nothing(file: KeyFile):
    file.add("acme")
    before = file.path.read_bytes()
    with pytest.raises(ConfigError, match="no key"):
        file.revoke("aaaaaaaaaaaa")
    assert file.path.read_bytes() == before


def test_the_secret_is_not_on_disk_and_the_file_is_private(file: KeyFile):
    _, text = file.add("acme")
    secret = text.partition(".")[2]
    assert secret not in file.path.read_text()
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert [path.name for path in file.path.parent.iterdir()] == ["keys.json"]


def test_a_key_names_its_tenant(file: KeyFile):
    _, acme = file.add("acme")
    _, other = file.add("other")
    ring = KeyRing(file)
    assert ring.authenticate(f"Bearer {acme}").tenant == "acme"
    assert ring.authenticate(f"bearer {other}").tenant == "other"


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer nf_",
        "Basic {key}",
        "{key}",
        "Bearer {key}x",
        "Bearer {key} {key}",
        "Bearer nf_aaaaaaaaaaaa.{secret}",
        "Bearer {id}.AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        "Bearer " + "n" * 100_000,
        "Bearer nf_\ud800",
    ],
)
def test_anything_but_a_whole_key_is_unauthorized(file: KeyFile, header: str | None):
    _, key = file.add("acme")
    ring = KeyRing(file)
    if header is not None:
        key_id, _, secret = key.partition(".")
        header = header.replace("{key}", key).replace("{secret}", secret).replace("{id}", key_id)
    with pytest.raises(Unauthorized) as caught:
        ring.authenticate(header)
    assert key not in caught.value.detail


def test_a_revoked_key_is_out_within_a_second_and_a_new_one_in(file: KeyFile):
    old, old_text = file.add("acme")
    clock = Clock()
    ring = KeyRing(file, clock)
    assert ring.authenticate(f"Bearer {old_text}").key_id == old.id
    file.revoke(old.id)
    _, new_text = file.add("acme")
    clock.now_s = 0.9
    with pytest.raises(Unauthorized):
        ring.authenticate(f"Bearer {old_text}")
    assert ring.authenticate(f"Bearer {new_text}").tenant == "acme"


@pytest.mark.parametrize("harm", ["remove", "expose", "garble"])
def test_a_file_gone_bad_admits_nobody_until_it_is_good_again(file: KeyFile, harm: str):
    _, text = file.add("acme")
    good = file.path.read_bytes()
    clock = Clock()
    ring = KeyRing(file, clock)
    if harm == "remove":
        file.path.unlink()
    elif harm == "expose":
        file.path.chmod(0o644)
    else:
        file.path.write_bytes(b"{")
    clock.now_s = 1.0
    with pytest.raises(Unauthorized):
        ring.authenticate(f"Bearer {text}")
    file.path.write_bytes(good)
    file.path.chmod(0o600)
    clock.now_s = 2.0
    assert ring.authenticate(f"Bearer {text}").tenant == "acme"


def test_the_commands_add_list_and_revoke(tmp_path: Path):
    path = str(tmp_path / "keys.json")
    run = CliRunner().invoke
    added = run(keys_command, ["add", "--file", path, "--tenant", "acme"])
    assert added.exit_code == 0
    text = added.stdout.strip()
    key_id = text[3:15]
    listed = run(keys_command, ["list", "--file", path])
    assert listed.stdout.split()[:2] == [key_id, "acme"]
    assert text.partition(".")[2] not in listed.output
    assert run(keys_command, ["revoke", "--file", path, key_id]).exit_code == 0
    assert json.loads(Path(path).read_text())["keys"] == []


def test_an_admin_key_says_so_and_a_plain_one_is_stored_as_ever(file: KeyFile):
    runner = CliRunner()
    for options in ([], ["--admin"]):
        told = ["add", "--file", str(file.path), "--tenant", "acme", *options]
        assert runner.invoke(keys_command, told).exit_code == 0
    plain, admin = json.loads(file.path.read_bytes())["keys"]
    assert "admin" not in plain
    assert admin["admin"] is True
    texts = [file.add("acme", admin=wanted)[1] for wanted in (False, True)]
    ring = KeyRing(file)
    assert [ring.authenticate(f"Bearer {text}").admin for text in texts] == [False, True]
    listed = runner.invoke(keys_command, ["list", "--file", str(file.path)]).output.splitlines()
    assert [line.endswith("  admin") for line in listed] == [False, True, False, True]
