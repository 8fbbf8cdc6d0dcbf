"""What each client does: it trains the global adapter on its own data."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

import task

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    net = task.model()
    set_peft_model_state_dict(net, message.content["arrays"].to_torch_state_dict())
    client, server_round = int(context.node_config["partition-id"]), int(message.content["config"]["server-round"])
    data = list(task.batches(seed=100 * server_round + client, count=10 + 5 * client))
    loss = task.train(net, data, float(context.run_config["lr"]))
    metrics = MetricRecord({"num-examples": sum(len(labels) for _, labels in data), "loss": loss})
    arrays = ArrayRecord(get_peft_model_state_dict(net))
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
