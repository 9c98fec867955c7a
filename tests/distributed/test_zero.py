from tests.distributed.launch import compare


def test_zero(subtests, tiny_model_dir, tmp_path):
    compare(subtests, "tests.distributed.cases", "zero", tiny_model_dir, tmp_path)
