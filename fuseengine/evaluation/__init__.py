"""Judging folders of fused images: metrics per image, tables, ranks, and a page to look at.

The path of the data: :mod:`~fuseengine.evaluation.pairing` finds which files belong together,
:mod:`~fuseengine.evaluation.run` measures them on all cores, :mod:`~fuseengine.evaluation.summary`
takes means and ranks, :mod:`~fuseengine.evaluation.tables` gives text, CSV and JSON, and
:mod:`~fuseengine.evaluation.report` one HTML file with everything in it, pictures
(:mod:`~fuseengine.evaluation.previews`) and box plots (:mod:`~fuseengine.evaluation.boxplots`)
included. Numbers that papers print are in :mod:`~fuseengine.evaluation.published`.

    found = pair_folders(Path("ir"), Path("vis"), {"ours": Path("fused")})
    evaluation = measure(found)
    Path("page.html").write_text(make_page(evaluation), encoding="utf-8")

None of it imports torch.
"""
