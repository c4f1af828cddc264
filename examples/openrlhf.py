"""OpenRLHF 0.11 with grpo-fast's objectives: its own command line, with the loss put in place in every Ray worker.

python examples/openrlhf.py <arguments of openrlhf.cli.train_ppo_ray>
"""

import runpy

import ray

if __name__ == "__main__":
    ray.init(runtime_env={"worker_process_setup_hook": "grpo_fast.integrations.openrlhf.install"})
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")
