"""Whether a submission is acceptable: resolved against files, base models and quotas."""
