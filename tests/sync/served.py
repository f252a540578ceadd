"""What tests that share one server agree on."""

UPDATE_TIMEOUT = 3.0  # after which the gate gives up an update that its sender has left
NUM_LAYERS = 4  # enough for a virtual pipeline on two ranks
