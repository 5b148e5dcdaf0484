"""What a message about a bad argument of `flash_kda.fwd` says was given, and what to do."""

from __future__ import annotations

import pytest
import torch
from test_arguments import assert_refused, legal_arguments


def test_a_large_integer_keeps_its_sign():
    assert_refused(ValueError, "scale", "got -inf", scale=-(10**400))


@pytest.mark.parametrize("value", ["yes", 1.0, torch.tensor(True)], ids=lambda value: type(value).__name__)
def test_validate_is_true_false_or_none(value):
    assert_refused(TypeError, "validate", type(value).__name__, "True, False or None", validate=value)


def test_what_is_missing_is_not_to_be_converted():
    assert_refused(TypeError, "k", "NoneType. Pass one.", k=None)


def test_strides_are_told_where_they_are_what_is_wrong():
    given = torch.zeros(1, 2 * legal_arguments()["A_log"].numel())[:, ::2]
    assert_refused(ValueError, "A_log", "contiguous", f"with strides {given.stride()}", A_log=given)
