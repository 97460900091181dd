"""The table "What works" of the README, from the tests that show it.

    python tests/what_works.py            print it
    python tests/what_works.py --write    put it into the README

A row names tests; where they run is read from their marks. `test_docs.py` fails if one of them is gone, or if the
README has another table.
"""

import ast
import sys
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parent
README = TESTS.parent / "README.md"
BEGIN, END = "<!-- written by tests/what_works.py -->\n", "<!-- end -->\n"
# Mark -> what runs a test that has it.
RUN_BY = {"gpu": "`make test-gpu`", "tasks": "`make test-tasks`"}
# Area -> what works -> the file behind `test_` and in it the tests, also behind `test_`, that show it.
ROWS = {
    "caches": {
        "dynamic": ("modeling_cache", ["decoding_equals_the_parallel_forward"]),
        "static, decoding compiled without a graph break or recompilation": (
            "modeling_generation",
            ["sixty_four_compiled_steps_on_a_static_cache_are_one_graph", "a_static_cache_of_the_user_is_used_twice"],
        ),
        "reorder, repeat, select, crop, reset": (
            "modeling_cache",
            [
                "reordered_beams_go_on_from_the_beam_they_were_copied_from",
                "repeated_and_selected_sequences_keep_all_their_state",
                "cropped_cache_goes_on_from_what_is_left",
                "a_reset_cache_is_as_good_as_new",
            ],
        ),
        "several turns from one cache, padded ones too": (
            "modeling_cache",
            ["a_padded_turn_of_a_chat_continues_as_if_it_had_no_padding"],
        ),
        "offloaded to the CPU, dynamic and static": (
            "modeling_gpu",
            ["a_cache_offloaded_to_the_cpu_generates_the_same"],
        ),
        'forgetting for good, `cache_implementation="fox"`: batches, beams, chunks, assisted decoding': (
            "eviction_cache",
            ["the_text_is_that_of_the_full_cache", "assisted_decoding_gives_the_greedy_text_and_still_forgets"],
        ),
        "its bound on lost attention, its limit in bytes, refusals": (
            "eviction_cache",
            [
                "no_row_of_attention_ever_had_more_on_what_was_dropped",
                "a_limit_is_kept_and_the_bound_says_so",
                "changed_weights_are_refused",
            ],
        ),
        "single steps over it, fused, compiled to one graph; weights that changed are refused": (
            "eviction_step",
            [
                "a_fused_step_gives_the_logits_of_the_model",
                "it_is_one_graph_for_the_compiler",
                "a_step_does_not_outlive_the_weights_it_was_made_of",
            ],
        ),
        "the same as CUDA graphs": ("eviction_step", ["gpu_replayed_steps_give_the_logits_of_the_model"]),
        "such steps in `generate`, by a `compile_config`": (
            "eviction_generate",
            ["the_text_is_the_same", "other_weights_are_another_step", "what_cannot_be_compiled_is_said"],
        ),
        "refused: quantized cache, continuous batching": (
            "modeling_generation",
            ["caches_without_a_place_for_gates_are_refused_with_those_that_have_one"],
        ),
    },
    "generation": {
        "greedy, padded batches, chunked prefill, without cache": (
            "modeling_generation",
            ["greedy_search_of_a_padded_batch_is_that_of_each_prompt"],
        ),
        "beams, sampling": (
            "modeling_generation",
            ["beam_search_with_a_cache_is_that_without", "sampling_with_a_cache_is_that_without"],
        ),
        "prompt lookup, assistant model": (
            "modeling_generation",
            ["prompt_lookup_gives_the_greedy_text", "assisted_decoding_gives_the_greedy_text"],
        ),
        "the same on a GPU": ("modeling_gpu", ["generates_what_eager_generates_from_left_padded_prompts"]),
    },
    "inputs": {
        "padding on either side": ("modeling_backends", ["padding_anywhere_changes_nothing"]),
        "packed documents, by `position_ids` or `cu_seq_lens_q`": (
            "modeling_inputs",
            ["packed_documents_are_as_if_alone"],
        ),
        "`inputs_embeds`, `output_attentions` (eager), `output_hidden_states`": (
            "modeling_inputs",
            [
                "embeddings_stand_for_tokens",
                "attention_weights_are_those_that_the_output_is_made_of",
                "hidden_states_are_those_between_the_layers",
            ],
        ),
        "`logits_to_keep`": ("modeling_backends", ["only_the_logits_asked_for_are_computed"]),
        "refused: attention implementations without gates": (
            "modeling_backends",
            ["a_backend_that_would_drop_the_gates_is_refused"],
        ),
    },
    "training": {
        "Trainer: language model, padded and packed, label smoothing": (
            "tasks_trainer",
            [
                "sentences_are_learned_by_heart_saved_and_told_by_a_pipeline",
                "documents_in_one_row_have_the_loss_of_padded_ones",
                "label_smoothing_is_of_the_next_token",
            ],
        ),
        "Trainer: classes of sequences and tokens, question answering": (
            "tasks_trainer",
            ["classes_are_learned_from_padded_texts", "answers_are_found_in_padded_texts"],
        ),
        "TRL: SFT (padded, packed, LoRA), DPO, GRPO": (
            "tasks_trl",
            ["sft_teaches_the_answers", "dpo_prefers_what_was_chosen", "grpo_finds_the_letters_that_pay"],
        ),
        "PEFT: LoRA on every projection, saved, loaded, merged": (
            "modeling_peft",
            ["every_projection_gets_an_adapter_and_learns", "transformers_itself_loads_the_adapter"],
        ),
        "FSDP2, tensor parallelism, context parallelism: the run of one process": (
            "training_parallel",
            ["two_processes_train_as_one_does"],
        ),
        "context parallelism, Ulysses and ring: packed rows, pruned": (
            "modeling_context_parallel",
            ["loss_and_every_gradient_are_those_of_one_process", "pruning_is_that_of_one_process"],
        ),
        "LoRA on 4 bits": ("tasks_quantized", ["adapters_on_four_bits_learn"]),
        "`torch.compile`, one graph": ("modeling_backends", ["training_step_compiles_to_one_graph"]),
        "the same on a GPU, forward and backward": (
            "modeling_gpu",
            ["compiled_training_has_the_gradients_of_uncompiled"],
        ),
        "gradient checkpointing": ("modeling_backends", ["gradient_checkpointing_changes_nothing"]),
        "refused: prefix tuning": ("modeling_peft", ["prefix_tuning_is_refused"]),
    },
    "pipelines, evaluation": {
        "`text-generation`": ("tasks_trainer", ["sentences_are_learned_by_heart_saved_and_told_by_a_pipeline"]),
        "`text-classification`, `token-classification`": ("modeling_heads", ["pipelines_take_the_heads"]),
        "lm-eval, model `hf`, a local task": (
            "tasks_lm_eval",
            ["it_scores_what_the_model_says_and_training_raises_the_score"],
        ),
    },
    "loading": {
        "sharded safetensors": ("modeling_registration", ["a_sharded_checkpoint_loads_to_the_same_weights"]),
        "`device_map`, layers on disk": (
            "modeling_placement",
            ["device_map_gives_the_same_model", "a_layer_on_disk_computes_and_generates_as_in_memory"],
        ),
        "torchao int8, bitsandbytes int8 and nf4; gates stay exact": (
            "tasks_quantized",
            [
                "it_computes_with_the_rounded_weights_and_the_exact_gates",
                "saved_it_loads_without_being_told",
            ],
        ),
        "tensor and pipeline parallelism": (
            "tasks_plans",
            ["two_processes_compute_and_generate_what_one_does"],
        ),
        "`torch.export` of prompts, without a cache": (
            "tasks_export",
            ["saved_and_loaded_it_computes_prompts_of_any_size"],
        ),
        "refused: export of a step of a static cache": (
            "tasks_export",
            ["a_step_that_would_lose_its_gates_is_refused"],
        ),
    },
    "the Hub": {
        "with the code: loads without this package": (
            "modeling_hub",
            ["a_folder_with_the_code_loads_where_only_torch_and_transformers_are"],
        ),
        "without: no remote code is ever run": (
            "modeling_hub",
            ["without_the_code_nothing_points_to_any", "with_the_package_code_in_the_folder_is_never_run"],
        ),
        "`push_to_hub`: config, weights, card, code if asked, and back": (
            "modeling_hub",
            ["pushed_to_a_hub_it_loads_from_there_and_its_code_only_where_it_is_needed"],
        ),
        "the operator from a kernel of the Hub, without this package": (
            "modeling_hub",
            ["the_operator_comes_from_a_kernel_of_the_hub"],
        ),
        "refused: pickled weights": ("modeling_hub", ["pickled_weights_are_refused"]),
    },
    "checkpoints of others": {
        "official: load, convert, back, every bit": (
            "modeling_conversion",
            ["official_to_ours_and_back_keeps_every_bit", "ours_to_theirs_and_back_keeps_every_bit"],
        ),
        "flash-linear-attention: the same": ("modeling_conversion", ["fla_to_ours_and_back_keeps_every_bit"]),
        "against flash-linear-attention's own model": (
            "tasks_fla",
            [
                "ours_computes_what_theirs_computes",
                "converted_and_back_it_loads_into_their_class_with_every_bit",
            ],
        ),
        "by the Auto classes": (
            "modeling_conversion",
            [
                "the_auto_classes_load_theirs_as_ours",
                "a_name_that_its_own_package_has_taken_stays_its_own",
            ],
        ),
        "`--add-gates`: the source's logits, and gates that learn": (
            "modeling_adoption",
            ["converted_it_has_the_logits_of_the_source", "fine_tuned_its_gates_close_where_that_helps"],
        ),
    },
}


@cache
def marks_of(file: str) -> dict[str, set[str]]:
    """Tests of a file, without `test_` -> marks of theirs or of the file that are in RUN_BY."""
    tree = ast.parse((TESTS / f"test_{file}.py").read_text(encoding="utf-8"))
    of_file, marks = set(), {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "pytestmark":
            of_file = marks_in(node.value)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            own = set().union(*map(marks_in, node.decorator_list))
            marks[node.name.removeprefix("test_")] = of_file | own
    return marks


def marks_in(node: ast.AST) -> set[str]:
    return {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)} & set(RUN_BY)


def table() -> str:
    """The table in Markdown.

    Raises:
        KeyError: If a row names a test that does not exist.
    """
    lines = ["| | works | shown by | run by |", "| --- | --- | --- | --- |"]
    for area, rows in ROWS.items():
        for what, (file, tests) in rows.items():
            marks = set().union(*(marks_of(file)[name] for name in tests))
            run_by = " ".join(RUN_BY[mark] for mark in sorted(marks)) or "`make test`"
            lines.append(f"| {area} | {what} | [test_{file}](tests/test_{file}.py) | {run_by} |")
            area = ""
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """`readme` with the table as it is now between the two comments."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table(), end="")
