"""torch.compile on a CUDA device, inside the engine's graph. Compiling takes about a minute."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.harness import psnr

torch = pytest.importorskip("torch")

SIZE = (64, 96)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "least_db"), [("fp32", 80), ("fp16", 50)])
def test_inductor_in_a_graph(model, make, pictures, precision, least_db):
    engine = make(model, SIZE, precision, backend="inductor", guard_db=20.0, max_error=1.0)
    assert set(engine.report.choice.values()) == {f"inductor/{precision}"}
    assert engine.report.psnr_db >= least_db
    ir, vis = pictures(SIZE)
    expected = make(model, SIZE)(ir, vis)
    assert psnr(engine(ir, vis), expected, 255.0) >= min(least_db, 45)
    np.testing.assert_array_equal(engine(ir, vis), engine(ir, vis))
