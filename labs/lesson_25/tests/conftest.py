"""Fixtures for all tests: the app in a fresh state and, for engine tests, the image and a stack."""

import os
import shutil
import signal

import fakeredis
import pytest

import app as app_module
from harness import engine
from harness.registry import private_registry

pytest_plugins = ["harness.judge", "harness.reader"]  # lesson only
BUILD_VERSION = "0a1b2c3"
BUILD_DATE = "2025-11-24T08:00:00Z"

SETTINGS = {
    *["REDIS_HOST", "REDIS_PORT", "REDIS_DB", "REDIS_URL", "REDIS_PASSWORD", "REDIS_PASSWORD_FILE"],
    *["LAB_ENV", "HOST", "PORT", "WEB_CONCURRENCY", "ACCESS_LOG", "BUILD_VERSION", "BUILD_DATE"],
    *["LAB25_PORT", "REGISTRY", "GHCR_OWNER", "IMAGE_TAG"],
}


def pytest_configure(config):
    """Hide the settings of the shell, and have a terminated run clean up as an interrupted one."""
    for name in SETTINGS:
        os.environ.pop(name, None)
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))


def pytest_runtest_setup(item):
    needs_engine = any(item.get_closest_marker(mark) for mark in ("engine", "swarm", "timing"))
    if needs_engine and engine.problem():
        pytest.fail(f"This test needs a Docker Engine: {engine.problem()}", pytrace=False)


@pytest.fixture
def app(monkeypatch):
    """The app's module as after its import: without a client, its circuit breaker closed."""
    monkeypatch.setattr(app_module, "_redis_client", None)
    monkeypatch.setattr(app_module, "_redis_password", None)
    monkeypatch.setattr(app_module, "breaker", app_module.CircuitBreaker())
    return app_module


@pytest.fixture
def client(app):
    return app.app.test_client()


@pytest.fixture
def redis_server(app, monkeypatch):
    """The Redis in which the app counts."""
    server = fakeredis.FakeServer()
    monkeypatch.setattr(app, "_redis_client", fakeredis.FakeRedis(server=server))
    return server


@pytest.fixture(scope="session", autouse=True)
def no_image_stays():
    """Remove all images that the tests have built."""
    yield
    if engine.has_built:
        engine.remove_images()


@pytest.fixture(scope="session")
def app_folder(pytestconfig):
    """The build context that is tested: the app's, unless the judge sets the reader's."""
    return pytestconfig.getoption("app_folder", engine.CONTEXT)


@pytest.fixture
def context(app_folder, tmp_path):
    """A copy of the build context, for a test to change."""
    return shutil.copytree(
        app_folder, tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__")
    )


@pytest.fixture(scope="session")
def image(app_folder):
    """The image, built with both arguments."""
    arguments = [
        f"--build-arg=BUILD_VERSION={BUILD_VERSION}",
        f"--build-arg=BUILD_DATE={BUILD_DATE}",
    ]
    return engine.build("dev", *arguments, context=app_folder)


@pytest.fixture(scope="session")
def registry(tmp_path_factory):
    """A registry that requires a login."""
    with private_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="session")
def stack(image, tmp_path_factory):
    """The local stack, up and healthy. Tests share it, and leave it as they found it."""
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
