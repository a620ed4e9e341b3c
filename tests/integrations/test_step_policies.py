"""Step policies of a pipeline's denoisers: from config.json, into an artifact, and back into config.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tfqc
from tests.integrations.pipelines import pipeline
from tfqc.errors import ArtifactError, PipelineError, SpecError
from tfqc.integrations.diffusers import TfqcConfig
from tfqc.integrations.diffusers.denoiser import TfqcDenoiser
from tfqc.integrations.diffusers.place import into
from tfqc.quant.step_policy import StepPolicy

POLICY = StepPolicy(1, 1, scope=("unet",))
PIPELINE = "normalize,discover-tib,plan-quantization{weights=none},select-maintenance,fold-cache"
RUNTIME = {"diffusion_step_policy": POLICY.to_config()}


def test_it_stands_in_the_config_that_is_saved(tmp_path: Path) -> None:
    pipe, _ = pipeline("ddpm", tmp_path)
    tfqc.compile(pipe.unet, schedule=pipe.scheduler, pipeline=PIPELINE, steps=3, step_policy=POLICY).save(
        tmp_path / "made"
    )
    into(tmp_path / "made", pipe)
    pipe.unet.save_pretrained(tmp_path / "unet")
    manifest = json.loads((tmp_path / "unet" / "artifact.tfqc" / "manifest.json").read_text())
    assert "first-steps=1 last-steps=1" in manifest["pipeline"]
    assert manifest["step_policy"] == POLICY.to_config()
    file = tmp_path / "unet" / "config.json"
    config = json.loads(file.read_text())
    assert config["quantization_config"]["runtime"] == RUNTIME
    assert TfqcDenoiser.from_pretrained(tmp_path / "unet").facts["runtime"] == RUNTIME
    policy = config["quantization_config"]["runtime"]["diffusion_step_policy"]
    for change, error, message in (
        ({"overlap": "native"}, ArtifactError, "has another diffusion_step_policy than the artifact was compiled with"),
        ({"schema_version": 2}, SpecError, "schema_version is 2, and 1 is what tfqc can carry out"),
    ):
        config["quantization_config"]["runtime"]["diffusion_step_policy"] = {**policy, **change}
        file.write_text(json.dumps(config))
        with pytest.raises(error, match=message):
            TfqcDenoiser.from_pretrained(tmp_path / "unet")


def test_a_model_that_was_quantized_while_it_was_loaded_keeps_it() -> None:
    config = TfqcConfig.from_dict({"quant_method": "tfqc", "target": "cpu-int8", "runtime": RUNTIME})
    assert config.to_dict()["runtime"] == RUNTIME and "runtime" not in TfqcConfig().to_dict()
    with pytest.raises(SpecError, match=r"last_steps\.mode is 'fp8'"):
        TfqcConfig(runtime={"diffusion_step_policy": {**POLICY.to_config(), "last_steps": {"count": 1, "mode": "fp8"}}})


def test_it_reaches_the_denoisers_in_its_scope(tmp_path: Path) -> None:
    """What is given, and what a model's own config says: here to a pipeline of passes that cannot carry it out."""
    pipe, call = pipeline("ddpm", tmp_path)
    with pytest.raises(SpecError, match="The step policy is for transformer, and this DDPMPipeline has unet: name it"):
        tfqc.quantize(pipe, step_policy=StepPolicy(1))
    given = {"pipeline": "normalize", "steps": 2, "calibration": [call]}
    with pytest.raises(PipelineError, match="No pass of the pipeline protects steps"):
        tfqc.quantize(pipe, "fake-quant", step_policy=POLICY, **given)
    pipe.unet.register_to_config(quantization_config={"runtime": RUNTIME})
    with pytest.raises(PipelineError, match="No pass of the pipeline protects steps"):
        tfqc.quantize(pipe, "fake-quant", **given)
    others = {"diffusion_step_policy": StepPolicy(1, scope=("transformer",)).to_config()}
    pipe.unet.register_to_config(quantization_config={"runtime": others})
    with pytest.warns(UserWarning, match="The unet's own step policy is for transformer, so it is not carried out"):
        tfqc.quantize(pipe, "fake-quant", **given)
