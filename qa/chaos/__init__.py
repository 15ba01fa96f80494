"""Breaks a real Lorry in every way of the fault matrix that this machine allows; an auditor looks at what is left."""
