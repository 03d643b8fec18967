"""Distillation as a LightningModule: `pip install lightning`. Run it for a few steps on random data."""

import lightning
import torch

import kdkernels as kd


class Distiller(lightning.LightningModule):
    def __init__(self, student, teacher, lr=1e-3, **options):
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()
        self.lr, self.options = lr, options

    def training_step(self, batch, index):
        inputs, labels = batch
        with torch.no_grad():
            teacher_logits = self.teacher(inputs)
        loss, stats = kd.kd_loss(self.student(inputs), teacher_logits, labels, return_stats=True, **self.options)
        self.log("loss", loss)
        self.log("agreement", stats.agreement.mean())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=self.lr)


def main(steps=4):
    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(32, 1000), torch.nn.Linear(32, 1000)
    data = torch.utils.data.TensorDataset(torch.randn(64, 32), torch.randint(0, 1000, (64,)))
    trainer = lightning.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    model = Distiller(student, teacher, lr=1e-2, temperature=2.0, kd_weight=0.9, ce_weight=0.1)
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=16))
    return float(trainer.callback_metrics["loss"])


if __name__ == "__main__":
    print(f"loss {main():.4f}")
