"""Names of what a MoE layer keeps for its gradients, for policies of `jax.checkpoint`:

    policy = jax.checkpoint_policies.save_only_these_names(*jaxmoe.residuals.NAMES)

With all of them kept, a checkpointed layer routes again for its gradient, but neither exchanges
tokens nor computes experts again. Leave out the large ones that are cheaper to make again.
"""

PLAN = "jaxmoe_plan"
"""Dispatch's plan: some integers for each choice."""
ROWS = "jaxmoe_rows"
"""Dispatch's rows [C, D] and their weights [C]. Without them (or `PLAN`) it runs again."""
GATE, UP = "jaxmoe_expert_gate", "jaxmoe_expert_up"
"""The products of rows with gate and up [C, F], before the activation. The "blocked" and "batched"
backends compute them again in any case."""
EXPERT_ROWS = "jaxmoe_expert_rows"
"""The experts' results [C, D]. Without them the experts' whole forward pass runs again, for the
gradient of the routing weights."""

NAMES = (PLAN, ROWS, GATE, UP, EXPERT_ROWS)
