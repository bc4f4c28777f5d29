"""The files that people start from: what vLLM's own parser makes of them, and what they name."""

import argparse
import json
import re
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

from support import ROOT
from vllm_mac import metrics

SERVE, MONITORING = ROOT / "examples" / "serve", ROOT / "examples" / "monitoring"
FILES = sorted(path.stem for path in SERVE.glob("*.yaml"))


@pytest.fixture(scope="module")
def serve():
    """(parser of `vllm serve`, function from arguments to engine arguments), as the command `vllm` has them."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    whole = FlexibleArgumentParser(prog="vllm")
    parser = ServeSubcommand().subparser_init(whole.add_subparsers(dest="subparser"))

    def arguments(*args: str) -> argparse.Namespace:
        parsed = whole.parse_args(["serve", *args])
        parsed.model = parsed.model_tag or parsed.model  # as the command does
        return AsyncEngineArgs.from_cli_args(parsed)

    return parser, arguments


def test_every_file_is_known():
    assert FILES == ["hybrid", "llama-3.1", "llama-3.3", "mistral", "qwen3", "qwen3-moe"]


@pytest.mark.parametrize("name", FILES)
def test_vllm_serve_takes_each_file(serve, name):
    parser, arguments = serve
    path = SERVE / f"{name}.yaml"
    keys = yaml.safe_load(path.read_text())
    assert not {key for key in keys if f"--{key}" not in parser._option_string_actions}
    args = arguments("--config", str(path))
    assert args.model == keys["model"]
    chosen = {kind: backend.name for kind, backend in args.attention_config.backend_per_kind.items()}
    if name == "hybrid":
        assert (args.attention_backend, chosen) == (None, {"full_attention": "MAC"})
    else:
        assert (getattr(args.attention_backend, "name", args.attention_backend), chosen) == ("MAC", {})
    for key in ("max_model_len", "max_num_seqs", "tensor_parallel_size", "hf_overrides"):
        if (option := key.replace("_", "-")) in keys:
            assert getattr(args, key) == keys[option]
    assert "additional-config" not in keys and args.additional_config == {}


def test_qwen3_is_as_long_as_its_file_says(serve, tmp_path):
    """YaRN is in the model's configuration as vLLM reads it; without it Qwen3 ends at 40,960 tokens."""
    own = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "max_position_embeddings": 40960}
    own |= {"rope_theta": 1000000, "head_dim": 128, "num_attention_heads": 32, "hidden_size": 4096}
    (tmp_path / "config.json").write_text(json.dumps(own))
    args = serve[1](str(tmp_path), "--config", str(SERVE / "qwen3.yaml"), "--skip-tokenizer-init")
    config = args.create_model_config()
    assert config.max_model_len == 131072
    assert {"rope_type": "yarn", "factor": 4.0}.items() <= config.hf_config.rope_parameters.items()
    args.hf_overrides = {}
    with pytest.raises(ValueError, match="40960"):
        args.create_model_config()


def test_an_option_on_the_command_line_comes_before_the_file(serve):
    args = serve[1]("other", "--config", str(SERVE / "llama-3.3.yaml"), "--distributed-executor-backend", "ray")
    assert (args.model, args.distributed_executor_backend, args.tensor_parallel_size) == ("other", "ray", 4)


# Monitoring


@pytest.fixture(scope="module")
def dashboard():
    return json.loads((MONITORING / "dashboard.json").read_text())


@pytest.fixture(scope="module")
def compose():
    return yaml.safe_load((MONITORING / "compose.yaml").read_text())


def test_every_panel_asks_for_series_that_exist(dashboard):
    import vllm.v1.metrics.loggers as loggers

    own = {metrics.HEADS, metrics.KV_TOKENS, metrics.EXACT, metrics.RINGS, "vllm_mac_ring_bytes"}
    own |= {f"{name}_bucket" for name in (metrics.ERROR, metrics.LAG, metrics.CHAIN)}
    source, asked = Path(loggers.__file__).read_text(), set()
    for target in (target for panel in dashboard["panels"] for target in panel["targets"]):
        for name in re.findall(r"vllm[_:]\w+(?={)", target["expr"]):
            asked.add(name)
            assert name in own or f'"{re.sub("_(total|bucket)$", "", name)}"' in source, name
        # Each series is of the chosen model, and nothing else is left open.
        assert target["expr"].count('{model_name=~"$model"') == len(re.findall("vllm[_:]", target["expr"]))
    assert own <= asked and any(name.startswith("vllm:") for name in asked)


def test_grafana_s_own_types_load_the_dashboard(dashboard):
    """What Grafana 11.6 publishes of its dashboards takes all of it: nothing is unknown, lost or changed."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    def kept(given, loaded, at="") -> list[str]:
        """Places where `loaded` lacks something of `given`; it may have defaults of its own."""
        if isinstance(given, dict) and isinstance(loaded, dict):
            return [x for key in given for x in kept(given[key], loaded.get(key), f"{at}/{key}")]
        if isinstance(given, list) and isinstance(loaded, list) and len(given) == len(loaded):
            return [x for i, pair in enumerate(zip(given, loaded, strict=True)) for x in kept(*pair, f"{at}/{i}")]
        return [] if given == loaded else [at]

    register_default_plugins()
    load = lambda given: json.loads(JSONEncoder().encode(Dashboard.from_json(given)))
    assert kept(dashboard, load(dashboard)) == []
    wrong = json.loads(json.dumps(dashboard))
    wrong["panels"][0]["gridPosition"] = wrong["panels"][0].pop("gridPos")
    assert kept(wrong, load(wrong)) == ["/panels/0/gridPosition"]


def test_panels_have_places_of_their_own(dashboard):
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_services_find_each_other(dashboard, compose):
    services = compose["services"]
    mounts = {name: dict(line.split(":")[:2] for line in service["volumes"]) for name, service in services.items()}
    for name, mounted in mounts.items():
        for source in mounted:
            assert source in compose["volumes"] or (MONITORING / source).exists(), (name, source)
    (job,) = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["vllm:8000"]}]
    assert mounts["prometheus"]["./prometheus.yml"] == "/etc/prometheus/prometheus.yml"  # where the image looks
    provisioning = MONITORING / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "vllm-mac.yaml").read_text())["providers"]
    place = mounts["grafana"]["./dashboard.json"]
    assert Path(place).parent == Path(provider["options"]["path"])
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == place
    variable = dashboard["templating"]["list"][0]
    assert variable["current"]["value"] == source["uid"] and variable["query"] == source["type"]
    # Nothing listens beyond this machine.
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])


def test_the_composed_server_is_one_of_mac(serve, compose):
    import tomllib

    service = compose["services"]["vllm"]
    args = serve[1](*(re.sub(r"\$\{MODEL:-(.*)}", r"\1", part) for part in service["command"]))
    assert args.model == "meta-llama/Llama-3.1-8B-Instruct"
    assert getattr(args.attention_backend, "name", args.attention_backend) == "MAC"
    dockerfile, project = service["build"]["dockerfile_inline"], tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {source for line in re.findall("COPY (.+) ", dockerfile) for source in line.split()}
    assert all((ROOT / source).exists() for source in copied)
    needed = {"pyproject.toml", project["project"]["readme"], *project["tool"]["setuptools"]["package-dir"].values()}
    assert needed | {"vllm_mac", "kernels"} <= copied  # vllm_mac/kernels is a link to kernels
    version, cuda = re.search(r"vllm-openai:v(\S+)", dockerfile)[1], project["project"]["optional-dependencies"]["cuda"]
    assert version in SpecifierSet(next(line for line in cuda if line.startswith("vllm")).removeprefix("vllm"))
