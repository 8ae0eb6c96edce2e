"""Eight CPU devices for every test, set before jax starts, and the options of the slow checks."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        # Eight devices share few cores here, and XLA aborts a collective that waits 40 s for its last device.
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600",
        "--xla_cpu_collective_call_terminate_timeout_seconds=1200",
        # Tests compile many small programs and run each for milliseconds: machine code of any quality halves the time.
        "--xla_backend_optimization_level=0",
        # The devices keep the cores busy; threads of each product would only wait for one another.
        "--xla_cpu_multi_thread_eigen=false",
        # Last, so that flags from outside win.
        os.environ.get("XLA_FLAGS", ""),
    ]
)
# What one test, worker or command compiled, the others need not compile again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="adaptrm-compiled-")  # removed when this process ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import jax
import pytest
from stores import new_folder, s3_server
from tiny import TOKENIZERS, tiny_tokenizer

from adaptrm.data.chat import ChatTokenizer
from adaptrm.parallel import make_mesh

# Two runs of one commit draw the same examples; a slow machine is no failure.
hypothesis.settings.register_profile("adaptrm", derandomize=True, deadline=None)
hypothesis.settings.load_profile("adaptrm")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smollm2", metavar="DIR", help="slow checks: the SmolLM2-135M-Instruct folder")
    parser.addoption("--data", metavar="DIR", help="slow checks: the folder of open preference data")


def pytest_configure(config: pytest.Config) -> None:
    assert jax.device_count() == 8, "jax was started before tests/conftest.py could ask for eight devices"
    config.option.loadscopereorder = False  # of pytest-xdist: by the number of tests, which is not their time


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, that workers with a file each end together."""
    items.sort(key=lambda item: item.path.name not in ("test_train.py", "test_demo.py"))


def _folder(request: pytest.FixtureRequest, option: str) -> Path:
    given = request.config.getoption(option)
    if given is None:
        pytest.skip(f"give {option} DIR to run this check")
    return Path(given)


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    return _folder(request, "--smollm2")


@pytest.fixture(scope="session")
def data(request: pytest.FixtureRequest) -> Path:
    return _folder(request, "--data")


@pytest.fixture(scope="session")
def one_device() -> jax.sharding.Mesh:
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def s3():
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(params=["memory", "s3"])
def store(request: pytest.FixtureRequest) -> str:
    """The address of an empty folder in a store."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    return new_folder(request.param)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """Where remote models are copied to, away from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("ADAPTRM_CACHE", str(folder))
        yield folder / "models"


@pytest.fixture(scope="module", params=TOKENIZERS)
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of tokenizer in turn."""
    return request.param


@pytest.fixture(scope="module")
def tokenizer_folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(kind)
    tiny_tokenizer(folder, kind)
    return folder


@pytest.fixture(scope="module")
def chat(tokenizer_folder: Path) -> ChatTokenizer:
    return ChatTokenizer.from_folder(tokenizer_folder)
