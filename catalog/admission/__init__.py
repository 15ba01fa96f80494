"""Validation of submitted jobs against files, base models and quotas."""
