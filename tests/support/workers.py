"""What tests ask workers in processes of their own."""

from vllm_mac.metrics import WorkerExtension


class Extension(WorkerExtension):
    def make_room(self) -> None:
        """vLLM makes room for what pipeline stages hand on in a profiling run, which eager engines on CPUs skip."""
        self.model_runner.profile_run()
