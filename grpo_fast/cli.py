"""The command line: `grpo-fast train`, `eval`, `export`, `doctor`.

What a user can mend ends in one `error: ...` line and exit code 2; a run stopped by Ctrl-C in 130, one stopped by a NaN
or by lack of memory in 1. Heavy imports happen inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from grpo_fast import __version__
from grpo_fast.install import install_command

_EPILOG = """\
examples:
  grpo-fast train recipes/demo.yaml                       the demo; files go to its output_dir
  grpo-fast train recipes/demo.yaml learning_rate=1e-5    any option of a recipe can be set as key=value
  grpo-fast train recipes/demo.yaml resume=auto           continue after Ctrl-C or a crash
  grpo-fast eval recipes/demo.yaml                        held-out accuracy of the untrained model
  grpo-fast eval runs/demo                                ... and of the trained one
  grpo-fast export runs/demo my-model                     Hugging Face folder (safetensors), LoRA merged
  grpo-fast doctor                                        which backends work here, and why others do not
"""
_EXTRAS = {"reasoning_gym": "demo", "gguf": "demo", "math_verify": "demo"}
"""Optional packages that do not come with the `train` extra."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="grpo-fast",
        description="Train language models by GRPO and its relatives, without a [tokens, vocab] tensor.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"grpo-fast {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks of errors and warnings of libraries")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    train = commands.add_parser(
        "train",
        parents=[common],
        help="run a recipe",
        description="Run a recipe: metrics, plot, checkpoints and the trained model go to its output_dir.",
        epilog="All options with their defaults: grpo-fast train --options",
    )
    train.add_argument("recipe", nargs="?", help="a YAML file, or the name of a recipe that comes with grpo-fast")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the recipe's")
    train.add_argument("--options", action="store_true", help="list every option with its default, and exit")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "eval",
        parents=[common],
        help="measure a model on held-out prompts",
        description="Measure the model of a recipe (untrained), or of a run or checkpoint, on the held-out prompts.",
    )
    evaluate.add_argument(
        "source", metavar="RECIPE|RUN|CHECKPOINT", help="a YAML file, or a run's or checkpoint's folder"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the recipe's")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser(
        "export",
        parents=[common],
        help="write a trained model as a Hugging Face folder",
        description="Write a trained model as a Hugging Face folder: safetensors, tokenizer; LoRA is merged.",
    )
    export.add_argument("source", metavar="RUN|CHECKPOINT", type=Path, help="a run's or checkpoint's folder")
    export.add_argument("target", metavar="OUT", type=Path, help="a folder that does not exist yet")
    export.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, as peft's folder")
    export.set_defaults(run=_export)

    doctor = commands.add_parser(
        "doctor",
        parents=[common],
        help="say what is installed and which backends work here",
        description="Say what is installed, which backends work here and why others do not, and hold those that do "
        "against a float64 oracle. Exit code 1 if one of them is wrong.",
    )
    doctor.set_defaults(run=_doctor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    _quiet_libraries(arguments.debug)
    from grpo_fast.trainer.errors import Interrupted, NonFiniteError, UserError

    try:
        return arguments.run(arguments)
    except UserError as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteError) else 2
    except Interrupted as stop:
        command = _resume_command(arguments, stop.resume)
        said = f"{stop}; its state is saved. To go on" if stop.step else "stopped before the first step. To start again"
        print(f"{said}:\n  {command}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `grpo-fast train --options | head`: whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if arguments.debug or not package or package == "grpo_fast" or importlib.util.find_spec(package) is not None:
            raise
        extra = _EXTRAS.get(package, "train")
        print(f"error: {package} is not installed; run {install_command(extra)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if arguments.debug or "out of memory" not in str(error).lower():
            raise
        hint = "lower max_tokens_per_microbatch or rollout.batch_size, or set model.gradient_checkpointing=true"
        print(f"error: out of memory; {hint}\n  {str(error).splitlines()[0]}", file=sys.stderr)
        return 1


def _train(arguments: argparse.Namespace) -> int:
    if arguments.options:
        from grpo_fast.trainer.recipe import describe_options

        print(describe_options())
        return 0
    from grpo_fast.trainer.errors import ConfigError
    from grpo_fast.trainer.recipe import load_config

    if arguments.recipe is None:
        raise ConfigError("recipe: expected a YAML file; got none (see grpo-fast train --help)")
    config = load_config(arguments.recipe, arguments.overrides)
    from grpo_fast.trainer.loop import train
    from grpo_fast.trainer.saved import summary

    _quiet_transformers(arguments.debug)
    result = train(config)
    print("\n".join(["", *summary(result.output_dir, result.train_seconds)]))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from grpo_fast.trainer.data import fitting, load_examples, prompt_limit
    from grpo_fast.trainer.errors import DataError
    from grpo_fast.trainer.evaluate import check_success_reward, evaluate
    from grpo_fast.trainer.model import load_policy, pick_device
    from grpo_fast.trainer.recipe import load_config
    from grpo_fast.trainer.rewards import build_rewards
    from grpo_fast.trainer.rollout import HFRollout
    from grpo_fast.trainer.saved import load_saved

    _quiet_transformers(arguments.debug)
    if Path(arguments.source).is_dir():
        config, policy = load_saved(Path(arguments.source), arguments.overrides)
    else:
        config = load_config(arguments.source, arguments.overrides)
        policy = load_policy(config.model, pick_device(config.device), trainable=False)
    rewards = build_rewards(config.rewards)
    check_success_reward(config, rewards)
    examples = load_examples(config.data, "eval")
    if not examples:
        raise DataError("data.eval: expected held-out prompts; there are none (set data.eval or data.eval_split)")
    limit = prompt_limit(config, policy.model)
    examples, notes = fitting(examples, policy.tokenizer, config, limit, "held-out set")
    print(*notes, sep="\n", end="\n" if notes else "")
    engine = HFRollout(policy, config.rollout, temperature=config.eval.temperature)
    metrics = evaluate(engine, rewards, examples, policy.tokenizer, config)
    print(f"{len(examples)} held-out prompts x {config.eval.num_generations_eval} completions")
    for name, value in metrics.items():
        print(f"  {name:<36} {value:.4f}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from grpo_fast.trainer.errors import ConfigError
    from grpo_fast.trainer.model import export
    from grpo_fast.trainer.saved import load_saved

    _quiet_transformers(arguments.debug)
    if arguments.target.exists():
        raise ConfigError(f"OUT: expected a folder that does not exist yet; {arguments.target} does")
    _, policy = load_saved(arguments.source, ["device=cpu"])
    export(policy, arguments.target, adapter=arguments.adapter)
    print(f"wrote {arguments.target}")
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from grpo_fast.doctor import doctor

    lines, sound = doctor()
    print("\n".join(lines))
    return 0 if sound else 1


def _resume_command(arguments: argparse.Namespace, resume: str) -> str:
    """The command that was given, with `resume` in place of what it said of resuming or overwriting."""
    kept = [text for text in arguments.overrides if text.partition("=")[0] not in ("resume", "overwrite")]
    return shlex.join(["grpo-fast", "train", arguments.recipe, *kept, resume])


def _quiet_libraries(debug: bool) -> None:
    """Keep libraries' progress bars and advice to their callers out of the way, unless asked for."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO if debug else logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if debug:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore")


def _quiet_transformers(debug: bool) -> None:
    """Its loading bars have no environment variable."""
    from transformers.utils import logging as transformers_logging

    if not debug:
        transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
