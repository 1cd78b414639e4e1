"""Kits and requests from elsewhere: what the hub signs, what a site unpacks, and what stands in a kit's files.

Belongs here: files that another party made, or that were changed. Does not: the engine (test_who_calls, test_nvflare).
"""

import functools
import io
import json
import stat
import zipfile

import pytest
from bounded import bounded, within
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmchain_fed import NVFlare, untrusted
from llmchain_fed.errors import ConfigError, LLMChainFedError
from llmchain_fed.runtimes import names
from llmchain_fed.runtimes.nvflare import engine, kits
from llmchain_fed.runtimes.nvflare.provisioning import authority, own_kit, registry, tool


def zipped(**members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name.replace("__", "."), content)
    return data.getvalue()


def asks(**fields):
    """A request that says this of itself."""
    said = {"name": "org-a", "kind": "site", "org": "a", "cert_type": "client"} | fields
    called = said["name"] if isinstance(said["name"], str) and "/" not in said["name"] else "org-a"
    signed = signing_request(2048, called)
    return zipped(request__json=json.dumps(said), **{f"{called}__csr": signed, "org-a__csr": signed})


@functools.cache
def key_of(bits):
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


@functools.cache
def signing_request(bits, name="org-a", organisation="a"):
    """A certificate signing request for an RSA key of this size, as PEM."""
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation)]
    )
    made = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key_of(bits), hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


def told(error):
    assert len(str(error)) < 1500
    assert untrusted.printable(str(error)) == str(error)


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch):
    """What is refused here never reaches the engine's own command."""

    def never(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(tool, "run", never)


@pytest.fixture
def hub(tmp_path):
    """An authority's folder, as far as a request is looked at."""
    folder = tmp_path / "hub"
    (folder / "ca").mkdir(parents=True)
    (folder / "profile.yaml").write_text("server: {host: hub1}\n")
    registry.write(folder, registry.CertificateRegistry())
    return folder


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"kind": "user", "cert_type": "lead", "name": "org-a"}, "asks for a certificate as admin org-a"),
        ({"kind": "server"}, "asks for a certificate as hub org-a"),
        ({"name": "org-b"}, "asks for a certificate as site org-b; it would be signed as site org-a"),
        ({"name": "\x1b[2J../../x"}, "asks for a certificate as site"),
        ({"name": ["org-a"]}, "asks for a certificate as site"),
        ({"kind": None}, "asks for a certificate as None"),
    ],
)
def test_a_request_is_signed_only_as_what_the_operator_says(fields, why, hub, tmp_path):
    path = tmp_path / "org-a.request.zip"
    path.write_bytes(asks(**fields))
    with pytest.raises(ConfigError, match=r"org-a\.request\.zip asks for") as error:
        authority.approve(path, hub)
    assert why in str(error.value)
    told(error.value)


@pytest.mark.parametrize(
    "name", ["server", "Server", "hub", "admin", "a b", "../a", ".a", "a/b", "a" * 65, "", "ä", "a\n"]
)
def test_a_site_cannot_be_called_as_the_hub_is(name, tmp_path):
    for attempt in (
        lambda: own_kit.request(name, "site", tmp_path / "x"),
        lambda: kits.provision_here(tmp_path / "y", sites=["ok", name], port=1),
        lambda: NVFlare(tmp_path, sites=[name]),
        lambda: names.check_name(name),
    ):
        with pytest.raises(ConfigError, match="is no name for a site") as error:
            attempt()
        told(error.value)
    assert not any(tmp_path.iterdir())


def test_a_request_for_the_name_of_the_hub_is_not_signed_as_a_site(hub, tmp_path):
    for name, why in (("server", "is no name for a site"), ("hub1", "is what sites reach the hub by")):
        path = tmp_path / f"{name}.request.zip"
        path.write_bytes(asks(name=name))
        with pytest.raises(ConfigError, match=why):
            authority.approve(path, hub)
    path = tmp_path / "HUB1.request.zip"
    path.write_bytes(asks(name="HUB1"))
    with pytest.raises(ConfigError, match="is what sites reach the hub by"):
        authority.approve(path, hub)


@pytest.mark.parametrize("altered", [{"name": "org-b"}, {"org": "another"}])
def test_a_request_that_says_something_else_than_its_key_signed_is_refused(altered, hub, tmp_path):
    """What is shown to whoever approves is what the key's owner signed."""
    said = {"name": "org-a", "kind": "site", "org": "a"} | altered
    path = tmp_path / f"{said['name']}.request.zip"
    path.write_bytes(zipped(**{"request__json": json.dumps(said), f"{said['name']}__csr": signing_request(2048)}))
    with pytest.raises(ConfigError, match="was altered") as error:
        authority.approve(path, hub)
    told(error.value)


def test_one_name_has_one_owner(hub, tmp_path):
    """Whatever the case of its letters; a certificate that was revoked owns nothing."""
    mark = registry.normal("ab" * 32)
    given = {"role": "site", "organisation": "a", "certificate": mark, "public_key": mark, "by": "me@hub"}
    given |= {"approved": registry.now(), "until": registry.now()}
    gone = {"revoked": registry.now(), "why": "left"}
    known = [{"name": "org-a"} | given, {"name": "org-b"} | given | gone]
    registry.write(hub, registry.CertificateRegistry.model_validate({"certificates": known}))

    def approve(name, **options):
        path = tmp_path / f"{name}.request.zip"
        path.write_bytes(asks(name=name))
        return authority.approve(path, hub, **options)

    for twin in ("org-a", "Org-A", "ORG-a"):
        with pytest.raises(ConfigError, match=r"org-a has a certificate already: .*say --replace") as error:
            approve(twin)
        told(error.value)
    for name, options in (("org-a", {"replace": True}), ("org-b", {}), ("org-c", {})):
        with pytest.raises(ConfigError, match=r"the authority's key .* is missing"):  # it would be signed
            approve(name, **options)
    assert len(registry.read(hub).certificates) == 2


@pytest.mark.parametrize("key", ["", "no key", None, 1024])
def test_a_key_that_is_none_or_too_short_is_not_signed(key, hub, tmp_path):
    path = tmp_path / "org-a.request.zip"
    said = json.dumps({"name": "org-a", "kind": "site", "org": "a"})
    pem = signing_request(key) if isinstance(key, int) else key
    parts = {"request__json": said} if pem is None else {"request__json": said, "org-a__csr": pem}
    path.write_bytes(zipped(**parts))
    with pytest.raises(ConfigError, match=r"org-a\.request\.zip") as error:
        authority.approve(path, hub)
    told(error.value)


def test_the_answer_to_a_request_overwrites_nothing(hub, tmp_path):
    path = tmp_path / "org-a.request.zip"
    path.write_bytes(asks())
    (tmp_path / "org-a.signed.zip").write_text("mine")
    with pytest.raises(ConfigError, match=r"is there already: nothing is overwritten\. That answer cannot be read"):
        authority.approve(path, hub)
    assert (tmp_path / "org-a.signed.zip").read_text() == "mine"
    for name in ("org-a.zip", "x.signed.zip", "..request.zip", "-x.request.zip"):
        (tmp_path / name).write_bytes(asks())
        with pytest.raises(ConfigError, match="should be called NAME"):
            authority.approve(tmp_path / name, hub)
    for name in ("..signed.zip", "x.zip", "-x.signed.zip"):
        with pytest.raises(ConfigError, match="should be called NAME"):
            own_kit.package(tmp_path / name, tmp_path, "SHA256:AA")


@bounded(seconds=60, megabytes=300)
def test_requests_of_any_kind_are_refused_with_one_error():
    import tempfile
    from pathlib import Path

    bomb = zipped(request__json=b" " * 60_000_000)
    deep = zipped(request__json='{"a":' * 50_000)
    pickle = b"\x80\x04\x95\x1a\x00\x00\x00"
    with tempfile.TemporaryDirectory() as folder:
        path, hub = Path(folder) / "org-a.request.zip", Path(folder) / "hub"
        (hub / "ca").mkdir(parents=True)
        (hub / "profile.yaml").write_text("server: {host: hub1}\n")
        registry.write(hub, registry.CertificateRegistry())

        def refused(data):
            path.write_bytes(data)
            with within(3), pytest.raises(LLMChainFedError) as error:
                authority.approve(path, hub)
            told(error.value)

        for data in (b"", b"PK\x03\x04", pickle, bomb, deep, zipped(other="x"), zipped(request__json=b"\xff")):
            refused(data)
        refused(bytes(2**20 + 1))
        path.unlink()
        path.mkdir()
        with pytest.raises(ConfigError):
            authority.approve(path, hub)
        path.rmdir()

        @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(st.integers(0, 10_000), st.binary(min_size=1, max_size=8))
        def check(at, change):
            data = bytearray(asks(kind="user"))
            at %= len(data)
            data[at : at + len(change)] = change
            refused(bytes(data))

        check()


ODD = [None, 1, [], {}, "x" * 10_000, "\x1b[2J", "", True, "a:b:c", "a:99999", ":", "a:-1", [[]], {"service": 1}]


@pytest.fixture
def kit(tmp_path):
    found = tmp_path / "kit"
    (found / "startup").mkdir(parents=True)
    (found / "local").mkdir()
    return found


def test_files_of_a_kit_that_make_no_sense_are_one_error(kit):
    client, admin = kit / "startup" / "fed_client.json", kit / "startup" / "fed_admin.json"
    for text in ("", "{", "[]", "null", "{" * 50_000, '{"a": NaN}', " " * (2**20 + 1), "\ud800", '{"servers": 1}'):
        client.write_bytes(text.encode("utf-8", "surrogatepass"))
        for read in (kits.site_name, kits.address, engine.check):
            with within(20), pytest.raises(ConfigError) as error:
                read(kit)
            told(error.value)
    for value in ODD:
        client.write_text(json.dumps({"client": {"fqsn": value}, "servers": [{"service": {"target": value}}]}))
        for read in (kits.site_name, kits.address):
            if read is kits.site_name and value == "a:b:c":
                continue
            if isinstance(value, str) and read is kits.site_name and value in ("a:99999", ":", "a:-1"):
                continue
            with pytest.raises(ConfigError):
                read(kit)
    for value in ODD:
        admin.write_text(json.dumps({"admin": {"username": "x", "host": "h", "port": value}}))
        if value is not True and value != 1:
            with pytest.raises(ConfigError):
                kits.address(kit)
    (kit / "local" / "resources.json.default").write_text("{}")
    with pytest.raises(ConfigError, match=r"resources\.json\.default"):
        kits.configure(kit)


def test_what_is_written_into_a_kit_is_for_this_account_alone(kit):
    (kit / "startup" / "fed_client.json").write_text("{}")
    default = {"components": [], "client": {}}
    (kit / "local" / "resources.json.default").write_text(json.dumps(default))
    elsewhere = kit.parent / "elsewhere"
    elsewhere.write_text("mine")
    (kit / "local" / "resources.json").symlink_to(elsewhere)
    kit.chmod(0o755)
    kits.configure(kit)
    assert stat.S_IMODE(kit.stat().st_mode) == 0o700
    for name in ("resources.json", "authorization.json"):
        assert stat.S_IMODE((kit / "local" / name).stat().st_mode) == 0o600
    assert elsewhere.read_text() == "mine"
