"""The adapters of the golden files: name -> (sizes of the MLP, fields of PEFT's BoneConfig)."""

CASES: dict[str, tuple[tuple[int, int, int], dict]] = {
    "bone": ((12, 8, 6), {"r": 4, "target_modules": ["lin0"]}),
    "bone-two-layers": ((12, 8, 6), {"r": 2, "target_modules": ["lin0", "lin1"]}),
    "bone-ragged": ((13, 9, 5), {"r": 4, "target_modules": ["lin0", "lin1"]}),
    "bone-random-start": ((12, 8, 6), {"r": 4, "target_modules": ["lin0"], "init_weights": False}),
    "bone-bias": ((12, 8, 6), {"r": 4, "target_modules": ["lin0"], "bias": "bone_only"}),
    "bone-modules-to-save": ((12, 8, 6), {"r": 4, "target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "bat": ((12, 8, 4), {"r": 4, "target_modules": ["lin0", "lin1"], "init_weights": "bat"}),
    "bat-square": ((8, 8, 8), {"r": 4, "target_modules": ["lin0", "lin1"], "init_weights": "bat"}),
}
