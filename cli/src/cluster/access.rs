// SPDX-License-Identifier: Apache-2.0
use super::Cluster;
use crate::failure::OrCure;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use std::path::PathBuf;
use std::time::Duration;

/// An API server that does not answer a connection within this is not there.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Which cluster, as with kubectl.
#[derive(Clone, Debug, clap::Args)]
pub struct Access {
    /// The kubeconfig; else `KUBECONFIG`, `~/.kube/config`, or the ServiceAccount of the pod that this runs in.
    #[arg(long, value_name = "FILE", help_heading = "Cluster")]
    pub kubeconfig: Option<PathBuf>,
    /// A context of the kubeconfig; else its current one.
    #[arg(long, help_heading = "Cluster")]
    pub context: Option<String>,
    /// The namespace that Podveil is installed in.
    #[arg(
        long,
        short,
        default_value = "podveil-system",
        help_heading = "Cluster"
    )]
    pub namespace: String,
}

impl Access {
    /// Nothing is asked of the API server yet.
    ///
    /// # Errors
    /// If no kubeconfig is found, or what it says cannot be used.
    pub async fn cluster(&self) -> anyhow::Result<Cluster> {
        let mut config = self.config().await.or_cure(
            match &self.kubeconfig {
                Some(path) => format!("reading the kubeconfig {}", path.display()),
                None => "finding the cluster".to_owned(),
            },
            "`kubectl config get-contexts` lists what there is; name one by `--kubeconfig` and `--context`",
        )?;
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        let server = config.cluster_url.to_string();
        let client = Client::try_from(config).or_cure(
            format!("preparing the connection to {server}"),
            "compare what `kubectl config view` says about this cluster",
        )?;
        Ok(Cluster {
            client,
            namespace: self.namespace.clone(),
        })
    }

    async fn config(&self) -> anyhow::Result<Config> {
        let options = KubeConfigOptions {
            context: self.context.clone(),
            ..KubeConfigOptions::default()
        };
        Ok(match &self.kubeconfig {
            Some(path) => {
                Config::from_custom_kubeconfig(Kubeconfig::read_from(path)?, &options).await?
            }
            None if self.context.is_some() => Config::from_kubeconfig(&options).await?,
            None => Config::infer().await?,
        })
    }
}
