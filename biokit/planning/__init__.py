"""What a run would need and cost under each layout, computed before anything is queued: see `plans.plan_run`."""
