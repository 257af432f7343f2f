"""What every test finds: the app in a fresh state and, for the engine tests, an engine."""

import os
import shutil
import signal

import fakeredis
import pytest

import app as lab25
from harness import engine, reader
from harness.registry import private_registry

pytest_plugins = ["harness.judge"]  # lesson only

BUILD_VERSION = "0a1b2c3"
BUILD_DATE = "2025-11-24T08:00:00Z"

SETTINGS = {
    *["REDIS_HOST", "REDIS_PORT", "REDIS_DB", "REDIS_URL", "REDIS_PASSWORD", "REDIS_PASSWORD_FILE"],
    *["LAB_ENV", "HOST", "PORT", "WEB_CONCURRENCY", "ACCESS_LOG", "BUILD_VERSION", "BUILD_DATE"],
    *["LAB25_PORT", "REGISTRY", "GHCR_OWNER", "IMAGE_TAG"],
}


def pytest_configure(config):
    """Let a terminated run clean up as an interrupted one does."""
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))


def pytest_runtest_setup(item):
    if item.get_closest_marker("engine") and (problem := engine.problem()):
        if os.environ.get("LAB25_ENGINE") == "required":
            pytest.fail(
                f"LAB25_ENGINE=required, but there is no Docker Engine: {problem}", pytrace=False
            )
        pytest.skip(f"no Docker Engine: {problem}")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """Keep the settings of the shell that runs pytest away from what is tested."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session", autouse=True)
def no_image_stays():
    """Remove at the end what any test has built."""
    yield
    if engine.has_built:
        engine.remove_images()


@pytest.fixture(scope="session", autouse=True)
def followed(request, tmp_path_factory):
    """What became of each unit of the texts that this run asks for.

    Readers follow them while the other tests run, but not beside tests that measure time: there
    they begin when the first test asks.
    """
    asked = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    units = [parameters["unit"] for parameters in asked if "unit" in parameters]
    if not units or engine.problem():
        yield None
        return
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    registry = request.getfixturevalue("registry")
    folder = tmp_path_factory.mktemp("texts")
    readers = reader.Readers(units, folder, registry, environment)
    if not any(item.get_closest_marker("timing") for item in request.session.items):
        readers.begin()
    yield readers
    readers.stop()


@pytest.fixture
def app(monkeypatch):
    """The app's module as after its import, with the counter off."""
    monkeypatch.setattr(lab25, "_redis_client", None)
    monkeypatch.setattr(lab25, "_passwords", set())
    return lab25


@pytest.fixture
def client(app):
    return app.app.test_client()


@pytest.fixture
def redis_server(app, monkeypatch):
    """A Redis that the app counts in; set `connected` to False to take it away."""
    server = fakeredis.FakeServer()
    monkeypatch.setattr(app, "_redis_client", fakeredis.FakeRedis(server=server))
    return server


@pytest.fixture(scope="session")
def app_folder(pytestconfig):
    """The folder of the Dockerfile that is tested: the app's, where nobody names another."""
    return pytestconfig.getoption("app_folder", engine.CONTEXT)


@pytest.fixture
def context(app_folder, tmp_path):
    """A copy of the build context, to be changed."""
    return shutil.copytree(
        app_folder, tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__")
    )


@pytest.fixture(scope="session")
def image(app_folder):
    """The image as a build with both arguments makes it."""
    arguments = [
        f"--build-arg=BUILD_VERSION={BUILD_VERSION}",
        f"--build-arg=BUILD_DATE={BUILD_DATE}",
    ]
    return engine.build("dev", *arguments, context=app_folder)


@pytest.fixture(scope="session")
def registry(tmp_path_factory):
    """A registry that wants a login."""
    with private_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="session")
def stack(image, tmp_path_factory):
    """The local stack, up and healthy; shared by many tests, which leave it so."""
    with engine.local_stack(tmp_path_factory.mktemp("stack"), image) as made:
        made.up()
        yield made


@pytest.fixture
def network():
    """A network without Redis."""
    name = f"{engine.RUN}-network"
    engine.docker("network", "create", name)
    yield name
    engine.docker("network", "rm", name)
