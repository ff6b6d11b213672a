"""Exporting programs and stages to formats that other runtimes execute.

* :mod:`fuseengine.export.files`: ``export_onnx(model, path, size, ...)``, ONNX files, checked
* :mod:`fuseengine.export.whole`: ``whole_to_onnx(program, stages, size, ...)``, all in one model
* :mod:`fuseengine.export.onnx`: ``stage_to_onnx(module, inputs, outputs)``, one network
* :mod:`fuseengine.export.typed`: ``typed(model, "fp16")``, half precision written into a graph
* :mod:`fuseengine.export.graph`: fixed sizes, folding, attention in parts
"""
