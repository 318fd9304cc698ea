"""A copy of the checkout's own code with every stage of two profiles done, for tests of what makes work anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from flows import plan as planning
from m1 import paths
from m1.config.profile import Profile
from m1.data import dvc
from m1.errors import M1Error
from m1.run import folder, identity, profiles
from m1.run.contract import StageResult, load_result
from m1.run.registry import parent_of, stage
from m1.run.resolve import resolve
from m1.run.stage import Need

CHECKOUT = Path(__file__).resolve().parents[2]
CODE = ("m1", "stages", "infra", "flows", "kernels", "data_specs")
FILES = (".dvc/config", ".dvcignore", ".gitignore")
#: `smoke` as it is, and a profile that asks for software-engineering tasks as well.
PLAIN, ASKING = "smoke", "asking"


def nothing_is_missing(need: Need) -> M1Error | None:
    return None


@dataclass
class World:
    """The copy, and what the plan says of it."""

    root: Path

    def path(self, name: str) -> Path:
        return self.root / name

    def profile(self, name: str) -> Profile:
        return profiles.load(name)

    def to_run(self, name: str) -> set[str]:
        """Stages that the plan would run."""
        rows = planning.plan(self.profile(name), missing=nothing_is_missing)
        return {row.stage for row in rows if row.action == "run"}


def write_profiles(root: Path) -> None:
    (root / "profiles").mkdir(exist_ok=True)
    content = yaml.safe_load((CHECKOUT / "profiles" / "smoke.yaml").read_text())
    (root / "profiles" / "smoke.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    content["name"] = ASKING
    content["synthesize"]["swe"] = {"faults_per_package": 2, "question_length": 300}
    content["rl-40k"]["swe"] = {"share": 0.5, "max_prompt_length": 340}
    content["evaluate"]["swe"] = {"tasks_per_kind": 2, "max_prompt_length": 340}
    (root / "profiles" / "asking.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def finish_everything(profile: Profile) -> None:
    """What a run of the whole order leaves, with small files in place of the work."""
    runs: dict[str, Path] = {}
    for name in profile.order:
        record = stage(name)
        if record.makes_data:
            output = paths.data_dir(profile.name, name)
            output.mkdir(parents=True)
            (output / "shard.bin").write_bytes(f"{name} of {profile.name}".encode() * 10)
            identity.note_made(record, profile, identity.data_identity(record, profile))
            dvc.commit(f"{name}@{profile.name}")
            digest = planning.lock.digest(name, profile.name)
            assert digest is not None
            identity.note_recorded(record, profile, digest)
            continue
        request = resolve(name, profile, nothing_is_missing, parent=runs.get(parent_of(profile, name) or ""))
        folder.prepare(request.run, request)
        if record.trains:
            (request.run / "checkpoint").mkdir()
        result = StageResult(
            stage=name, fingerprint=request.fingerprint, request=request,
            checkpoint="checkpoint" if record.trains else None, key_metric="loss", before=1.0, after=0.5, metrics={},
        )  # fmt: skip
        folder.write_record(request.run / folder.RESULT, result)
        assert load_result(request.run) == result
        if record.trains:
            runs[name] = request.run
