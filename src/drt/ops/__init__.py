"""Operators: functions of tensors and indices that know nothing of models."""
