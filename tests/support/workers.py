"""What tests ask workers in processes of their own."""

from types import SimpleNamespace

from vllm_mac.metrics import WorkerExtension


class Extension(WorkerExtension):
    def make_room(self) -> None:
        """vLLM makes room for what pipeline stages hand on in a profiling run, which eager engines on CPUs skip."""
        self.model_runner.profile_run()

    def watch(self, tolerance: float) -> None:
        """Decode with another tolerance, and compare each step of this worker's layers with the rule, until `watched`."""
        from support.index_engine import set_tolerance
        from support.index_shadow import index_shadow

        llm = SimpleNamespace(driver_worker=SimpleNamespace(worker=self))
        llm.llm_engine = SimpleNamespace(model_executor=llm)
        set_tolerance(llm, tolerance)
        self.mac_shadow = index_shadow(llm)
        self.mac_watch = self.mac_shadow.__enter__()

    def watched(self) -> dict[str, float]:
        """What the comparison found."""
        self.mac_shadow.__exit__(None, None, None)
        return {name: getattr(self.mac_watch, name) for name in ("worst", "rows", "looked", "undecided", "pages")}
