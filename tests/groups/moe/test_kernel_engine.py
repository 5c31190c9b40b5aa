from tests.groups.moe.test_host_engine import check_alone


def test_tokens_of_one_rank():
    check_alone("triton")
