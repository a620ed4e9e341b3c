"""What emitters of `model.py` share: operations as Python, bodies of functions, files of tensors."""
