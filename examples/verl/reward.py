"""The reward as verl calls it: the share of the wanted strings that an answer contains."""

from longact_kernels.tasks.rewards import string_match


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    return string_match([solution_str], [list(ground_truth)])[0]
