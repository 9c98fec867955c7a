from tests.distributed.launch import compare


def test_fsdp(subtests, tiny_model_dir, tmp_path):
    compare(subtests, "tests.distributed.cases", "fsdp", tiny_model_dir, tmp_path)
