//! An HTTP server whose answer a test sets, and whose files it writes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use kiln_model::check::{Check, HttpCheck};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

#[derive(Clone)]
pub struct Server {
    pub port: u16,
    pub status: Arc<Mutex<u16>>,
    pub files: Arc<Mutex<HashMap<String, String>>>,
    pub requests: Arc<AtomicU64>,
}

impl Server {
    pub async fn start() -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    pub fn on(listener: TcpListener) -> Self {
        let server = Self {
            port: listener.local_addr().unwrap().port(),
            status: Arc::new(Mutex::new(200)),
            files: Arc::default(),
            requests: Arc::default(),
        };
        let serving = server.clone();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let server = serving.clone();
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        match stream.read_u8().await {
                            Ok(byte) => head.push(byte),
                            Err(_) => return,
                        }
                    }
                    let answer = server.answer(&String::from_utf8_lossy(&head));
                    let _ = stream.write_all(answer.as_bytes()).await;
                    let _ = stream.shutdown().await;
                });
            }
        });
        server
    }

    fn answer(&self, head: &str) -> String {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let path = head.split(' ').nth(1).unwrap_or_default();
        let body = self.files.lock().unwrap().get(path).cloned().unwrap_or_default();
        let status = *self.status.lock().unwrap();
        format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
    }

    pub fn set(&self, status: u16) {
        *self.status.lock().unwrap() = status;
    }

    pub fn check(&self) -> Check {
        Check::Http(HttpCheck { port: self.port, path: "/".to_owned(), status: None, body: None })
    }
}
