"""README's table of what runs with it: every row's claims have tests, which are there.

A row is known by how it begins. Where its words change, look whether its tests still show what they say.
"""

import ast

import pytest

from support import ROOT

OUTCOMES = ("supported", "uses MAC", "exact", "stays exact, with a warning", "refused")
# The beginning of each row; tests of the column of the index, and of that of `match`.
SHOWN = {
    "vLLM 0.32 and 0.33": (
        ["test_vllm_names::test_every_name_and_call_fits", "test_doctor::test_versions_are_those_that_pip_is_told",
         "test_kernels_lookup::test_agrees_with_the_rule"],
        ["test_vllm_names::test_every_override_fits", "test_engine_gpu::test_vllms_default_gives_flashinfers_tokens"],
    ),
    "sm80, sm89; sm100": (
        ["test_compiled::test_kernels_compile_and_fit", "test_startup::test_gpus_that_are_too_new_for_an_index"],
        ["test_compiled::test_kernels_compile_and_fit", "test_startup::test_gpus_that_are_too_old_for_a_ring"],
    ),
    "MHA, GQA, MQA": (
        ["test_kernels_lookup::test_agrees_with_the_rule", "test_engine_index::test_every_step_is_the_rule_s"],
        ["test_kernels_hit::test_groups", "test_engine_exact::test_tokens_equal_exact_attention"],
    ),
    "RoPE with llama3": (
        ["test_engine_index::test_every_step_is_the_rule_s", "test_index_models::test_models_whose_rotation_is_unknown_are_served"],
        ["test_rope::test_undo_inverts_the_module_that_the_model_runs", "test_engine_exact::test_tokens_equal_exact_attention"],
    ),
    "speculation": (
        ["test_index_speculation::test_rejected_tokens_leave_no_stale_index", "test_speculation_gpu::test_steps_that_verify_skip_tokens",
         "test_layers::test_which_layers_of_a_draft_run_on_macs_kernels"],
        ["test_layers::test_how_many_tokens_of_a_row_decode_at_once", "test_engine_draft::test_a_draft_model_is_exact_and_leaves_the_other_served"],
    ),
    "LongRoPE": (
        ["test_index_models::test_models_whose_rotation_is_unknown_are_served"],
        ["test_rope::test_longrope_is_refused", "test_rope::test_rope_somewhere_else_is_refused",
         "test_layers::test_rotation_by_several_positions_needs_text_alone"],
    ),
    "chunked prefill": (
        ["test_engine_index::test_every_step_is_the_rule_s", "test_index_features::test_features_are_exact_at_tolerance_nought",
         "test_index_workers::test_two_workers_say_what_one_says", "test_index_data_parallel::test_two_engines_say_what_one_says",
         "test_cuda_lookup::test_a_captured_batch_has_rows_that_do_nothing",
         "test_sleep::test_an_engine_sleeps_on_a_gpu"],
        ["test_engine_exact::test_tokens_equal_exact_attention", "test_engine_gpu::test_graphs_give_what_eager_steps_give",
         "test_index_features::test_features_are_exact_with_the_other_rule_at_threshold_one",
         "test_metrics_server::test_a_request_s_counters_with_two_api_servers_and_two_engines", "test_engine_gpu::test_two_gpus_give_what_one_gives", "test_sleep::test_an_engine_that_slept_decodes_and_counts_as_one_that_did_not"],
    ),
    "`n`, beam search": (
        ["test_index_features::test_features_are_exact_at_tolerance_nought", "test_index_features::test_prompt_logprobs_beside_requests_that_decode"],
        ["test_index_features::test_features_are_exact_with_the_other_rule_at_threshold_one",
         "test_index_features::test_prompt_logprobs_beside_requests_that_decode"],
    ),
    "models with Mamba": (
        ["test_index_hybrid::test_a_hybrid_model_is_served", "test_index_hybrid::test_a_hybrid_model_is_served_by_a_gpu",
         "test_startup::test_hybrid_models_have_an_index"],
        ["test_engine_copies::test_no_request_reads_the_ring_of_a_block_s_former_owner"],
    ),
    "sliding-window, soft-capped": (
        ["test_layers::test_what_mac_does_not_compute_is_exact", "test_layers::test_layers_of_chunked_local_attention_are_exact",
         "test_index_speculation::test_rejected_tokens_leave_no_stale_index"],
        ["test_layers::test_what_mac_does_not_compute_is_exact", "test_engine_draft::test_a_draft_model_is_exact_and_leaves_the_other_served"],
    ),
    "attention sinks": (
        ["test_layers::test_what_mac_does_not_compute_is_exact"], ["test_engine_exact::test_layers_with_attention_sinks_are_exact"],
    ),
    "KV connectors": (
        ["test_index_connectors::test_prefixes_from_vllm_s_example_connector", "test_index_connectors::test_what_was_handed_over_is_indexed",
         "test_offload_gpu::test_what_native_offload_loads_is_indexed", "test_startup::test_kv_connectors_that_an_index_takes",
         "test_index_nixl::test_pages_that_came_by_nixl_are_indexed", "test_index_nixl::test_pages_of_other_engines_are_refused",
         "test_nixl_gpu::test_pages_that_came_by_nixl_are_indexed", "test_index_lmcache::test_what_lmcache_hands_over_is_indexed",
         "test_startup::test_lmcache_is_taken_on_cpus"],
        ["test_startup::test_kv_connectors_that_an_index_takes"],
    ),
    "FP8 KV cache": (
        ["test_kernels_lookup::test_agrees_with_the_rule", "test_kernels_lookup::test_append_rounds_to_fp8",
         "test_cuda_lookup::test_written_pages_are_indexed", "test_startup::test_fp8_caches_by_index_on_gpus",
         "test_fp8_gpu::test_every_step_is_the_rule_s"],
        ["test_startup::test_fp8_caches_by_index_on_gpus"],
    ),
    "MLA, encoders": (
        ["test_startup::test_models_that_mac_cannot_serve", "test_startup::test_what_mac_cannot_serve", "test_startup::test_batch_invariance"],
        ["test_startup::test_what_mac_cannot_serve", "test_capabilities::test_what_is_refused_is_refused_with_its_reason"],
    ),
}  # fmt: skip


def rows() -> list[list[str]]:
    """The table's rows: what it is about, with the index, with `match`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("| model, feature or machine | with the index | with `match` |\n")
    lines = rest.partition("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_row_is_shown_by_tests_and_no_test_is_of_a_row_that_is_gone():
    begun = {beginning: [row for row in rows() if row[0].startswith(beginning)] for beginning in SHOWN}
    assert {beginning: len(found) for beginning, found in begun.items()} == dict.fromkeys(SHOWN, 1)
    assert [row[0] for row in rows() if not any(row[0].startswith(beginning) for beginning in SHOWN)] == []
    assert len(rows()) == len(SHOWN) and all(len(row) == 3 for row in rows())


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:30])
def test_a_cell_says_what_happens(row):
    """In one of a few words, so that nobody has to guess what others mean."""
    for cell in row[1:]:
        assert any(word in cell for word in OUTCOMES) or "never run" in cell, cell


@pytest.mark.parametrize("beginning", SHOWN)
def test_the_tests_are_there(beginning):
    for column in SHOWN[beginning]:
        assert column
        for name in column:
            file, _, function = name.partition("::")
            tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
            assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
