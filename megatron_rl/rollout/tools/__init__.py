"""Tools that answer the policy in an episode of several turns: one file each, with a function
`reply(prompt, turns)` that returns the tool's answer to the last of the policy's turns, or None to
end the episode. It is called in a process of its own and keeps no state: all turns so far come with
every call.
"""
