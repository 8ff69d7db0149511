"""Changes of a graph: nodes that ops read instead, ops that are removed, replaced and inserted."""


def read_instead(dag, old, new):
    """Replace node `old` by `new` in the inputs of all ops and in the outputs."""
    for entry in dag.ops.values():
        entry["in_nodes"] = tuple(new if node == old else node for node in entry.inputs)
    dag.outputs_nodes = tuple(new if node == old else node for node in dag.outputs_nodes)


def remove_op(dag, name):
    """Remove an op with one input. Its readers then read that input."""
    entry = dag.ops[name]
    read_instead(dag, entry.out, entry.inputs[0])
    del dag.ops[name], dag.nodes[entry.out]
    delattr(dag, name)


def remove_unread(dag):
    """Remove every op that only rearranges values and that nothing reads, as an unused part of a split."""
    for name, entry in reversed(list(dag.ops.items())):
        if entry.op.rearranges and not dag.readers(entry.out) and entry.out not in dag.outputs_nodes:
            remove_op(dag, name)


def remove_writer(dag, node):
    """Remove the op that writes a node, if nothing reads it any more, and then what only that op read."""
    name = dag.writer(node)
    if name is None or dag.readers(node) or node in dag.outputs_nodes:
        return
    entry = dag.ops[name]
    del dag.ops[name], dag.nodes[node]
    delattr(dag, name)
    for read in entry.inputs:
        remove_writer(dag, read)


def replace_op(dag, name, op):
    """Replace the layer of op `name` by `op`."""
    dag.ops[name]["op"] = op
    setattr(dag, name, op)


def insert_after(dag, node, op_type, op):
    """Insert a new op that reads `node`, right behind the op that writes it. Returns the new op's output node."""
    taken, count = set(dag.ops), 1
    while f"{op_type}{count}" in taken:
        count += 1
    name, out = f"{op_type}{count}", f"{op_type}{count}_out1"
    before = dag.writer(node)
    path = dag.ops[before].path if before else ""
    dag.add_op(name, op, [node], [out], path)
    position = list(dag.ops).index(before) + 1 if before else 0
    for later in list(dag.ops)[position:-1]:
        dag.ops.move_to_end(later)
    return out


def has_weights_behind(dag, name):
    """Whether a layer with trained weights reads the output of op `name`, directly or through other ops."""
    reached = {dag.ops[name].out}
    for entry in dag.ops.values():
        if reached.isdisjoint(entry.inputs):
            continue
        if entry.op.is_trained:
            return True
        reached.add(entry.out)
    return False


def holds_image(dag, node):
    """Whether a node is an input, or is computed from inputs by ops without trained weights only."""
    name = dag.writer(node)
    return name is None or (
        not dag.ops[name].op.is_trained and all(holds_image(dag, read) for read in dag.ops[name].inputs)
    )


def insert_behind(dag, name, op_type, op):
    """Insert a new op with one input behind op `name`; all readers of that op then read the new one."""
    node = dag.ops[name].out
    readers, outputs = [dag.ops[each] for each in dict.fromkeys(dag.readers(node))], dag.outputs_nodes
    out = insert_after(dag, node, op_type, op)
    for entry in readers:
        entry["in_nodes"] = tuple(out if each == node else each for each in entry.inputs)
    dag.outputs_nodes = tuple(out if each == node else each for each in outputs)
    return out
