"""Verifiers of the responses of a whole group. Each module here is a choice of
`reward.group_verifier`.

A module defines `group_rewards`, which has the signature of `reward.protocols.GroupVerifier`. To
add a group verifier, add a module.
"""
