"""Verifiers of one response. Each module here is a choice of `data.tasks[].verifier`.

A module defines `verify`, which has the signature of `reward.protocols.Verifier`. To add a
verifier, add a module.
"""
